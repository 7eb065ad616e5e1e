"""Training as papers describe it: passes over batches until a score on held-out items no longer rises, and rates of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_positive

B = TypeVar("B")


class History(NamedTuple):
    """How training went.

    Attributes:
        losses: mean of each pass.
        scores: on held-out items after each pass that was scored; empty without a score.
        best: number of the pass whose state the model has now: that of the best score, else the last.
    """

    losses: list[float]
    scores: list[float]
    best: int


def train(
    model: nn.Module,
    batches: Callable[[], Iterable[B]],
    loss: Callable[[B], Tensor],
    optimizer: Optimizer,
    *,
    passes: int,
    clip: float | None = None,
    accumulate: int = 1,
    schedule: LRScheduler | None = None,
    score: Callable[[], float] | None = None,
    score_every: int = 1,
    patience: int | None = None,
) -> History:
    """Pass over the batches; where a score is given, stop when it no longer rises, and go back to its best state.

    Args:
        model: in training mode while it is trained, in eval mode while it is scored and afterwards.
        batches: gives those of one pass, in a fresh order each time.
        loss: of a batch, a mean over its items.
        optimizer: of the model's parameters.
        passes: at most.
        clip: largest norm of the gradient.
        accumulate: batches whose mean gradient makes one step; what is left at the end of a pass makes one too.
        schedule: of the rate, stepped after each step.
        score: of the model as it is, on items that it is not trained on; higher is better. It is run without gradients.
        score_every: passes between two scores; the last pass is scored too.
        patience: scores that are no better after which training stops; `None`: never.

    Raises:
        InputError: where a pass has no batch, or patience has no score to wait for.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> x = torch.randn(8, 2)
        >>> adam = torch.optim.Adam(layer.parameters(), lr=0.1)
        >>> history = train(layer, lambda: x.split(4), lambda x: (layer(x) - x.sum(1, True)).square().mean(), adam, passes=20)
        >>> history.losses[-1] < history.losses[0], history.best
        (True, 19)
    """
    require_at_least(1, passes=passes, accumulate=accumulate, score_every=score_every)
    if clip is not None:
        require_positive(clip=clip)
    if patience is not None:
        require_at_least(1, patience=patience)
        if score is None:
            raise InputError("patience: waits for a score to rise, and there is none; give score as well")
    history = History([], [], -1)
    kept: dict[str, Tensor] | None = None
    highest, no_better = -math.inf, 0
    for number in range(passes):
        model.train()
        history.losses.append(_one_pass(model, batches(), loss, optimizer, clip, accumulate, schedule))
        model.eval()
        if score is None:
            history = history._replace(best=number)
            continue
        if (number + 1) % score_every and number + 1 < passes:
            continue
        with torch.no_grad():
            history.scores.append(score())
        if kept is None or history.scores[-1] > highest:
            highest, no_better = history.scores[-1], 0
            history = history._replace(best=number)
            kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
            continue
        no_better += 1
        if patience is not None and no_better >= patience:
            break
    if kept is not None:
        model.load_state_dict(kept)
    return history


def train_steps(
    model: nn.Module,
    draw: Callable[[], B],
    loss: Callable[[B], Tensor],
    optimizer: Optimizer,
    *,
    steps: int,
    stretch: int = 100,
    **settings: Any,
) -> History:
    """As `train`, but of so many steps, each on a batch that is drawn anew; a stretch of them takes the place of a pass.

    Args:
        model, loss, optimizer: as of `train`.
        draw: gives the batch of a step.
        steps: in all.
        stretch: steps whose mean loss is told, and after which a score is asked for.
        settings: further ones of `train`.

    >>> layer = torch.nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> history = train_steps(layer, lambda: torch.randn(4, 2), lambda x: layer(x).square().mean(), sgd, steps=250)
    >>> len(history.losses)
    3
    """
    require_at_least(1, steps=steps, stretch=stretch)
    lengths = iter([stretch] * (steps // stretch) + [steps % stretch] * (steps % stretch > 0))
    return train(
        model,
        lambda: (draw() for _ in range(next(lengths))),
        loss,
        optimizer,
        passes=-(-steps // stretch),
        **settings,
    )


def _one_pass(
    model: nn.Module,
    batches: Iterable[B],
    loss: Callable[[B], Tensor],
    optimizer: Optimizer,
    clip: float | None,
    accumulate: int,
    schedule: LRScheduler | None,
) -> float:
    values: list[float] = []
    for together in _groups(batches, accumulate):
        optimizer.zero_grad(set_to_none=True)
        for batch in together:
            value = loss(batch)
            (value / len(together)).backward()
            values.append(float(value.detach()))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    if not values:
        raise InputError("batches: gave nothing in a pass; an iterator is spent after one, so give what makes one")
    return math.fsum(values) / len(values)


def _groups(batches: Iterable[B], size: int) -> Iterator[list[B]]:
    group: list[B] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def in_batches(items: int, size: int, generator: torch.Generator | None = None) -> Sequence[Int[Tensor, "chosen"]]:
    """The numbers of the items of each batch of a pass, in an order drawn anew.

    >>> [len(chosen) for chosen in in_batches(5, 2)]
    [2, 2, 1]
    """
    require_at_least(1, items=items, size=size)
    return torch.randperm(items, generator=generator).split(size)


def inverse_root_schedule(optimizer: Optimizer, warm_up: int) -> LambdaLR:
    """The rate rises to that of the optimiser in `warm_up` steps, then falls with the root of the steps.

    `lr min(t / w, sqrt(w / t))` at step `t`, from 1; with `lr = (dim w)^-0.5` that of Vaswani et al.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule = inverse_root_schedule(optimizer, warm_up=4)
    >>> schedule.get_last_lr()
    [0.25]
    """
    require_at_least(1, warm_up=warm_up)
    return LambdaLR(optimizer, lambda t: min((t + 1) / warm_up, (warm_up / (t + 1)) ** 0.5))


def linear_schedule(optimizer: Optimizer, steps: int, warm_up: int = 0) -> LambdaLR:
    """The rate rises to that of the optimiser in `warm_up` steps, then falls by the same amount each step, to 0 after `steps`.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> linear_schedule(optimizer, steps=10, warm_up=4).get_last_lr()
    [0.25]
    """
    _require_room(steps, warm_up)
    return LambdaLR(
        optimizer, lambda t: (t + 1) / warm_up if t < warm_up else max(0.0, (steps - t) / (steps - warm_up))
    )


def cosine_schedule(optimizer: Optimizer, steps: int, warm_up: int = 0) -> LambdaLR:
    """The rate rises to that of the optimiser in `warm_up` steps, then falls along a half cosine, to 0 after `steps`.

    `lr (1 + cos(pi (t - w) / (steps - w))) / 2` at step `t`, from 0: no step of the training has a rate of 0.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> schedule = cosine_schedule(optimizer, steps=2)
    >>> optimizer.step(); schedule.step(); round(schedule.get_last_lr()[0], 6)
    0.5
    """
    _require_room(steps, warm_up)
    return LambdaLR(
        optimizer,
        lambda t: (
            (t + 1) / warm_up
            if t < warm_up
            else (1 + math.cos(math.pi * min(1.0, (t - warm_up) / (steps - warm_up)))) / 2
        ),
    )


def _require_room(steps: int, warm_up: int) -> None:
    require_at_least(1, steps=steps)
    require_at_least(0, warm_up=warm_up)
    if warm_up >= steps:
        raise InputError(f"warm_up: expected fewer steps than the {steps} of the training, got {warm_up}")


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(own: Tensor) -> Tensor:
    """The rows of all processes that train together, with a way back for their gradients; as many from each.

    >>> gathered(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if not several_processes():
        return own
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(own)))


def averaged(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several states of a model, parameter by parameter; whole numbers are those of the last.

    Args:
        states: as `state_dict()` gives them.

    Raises:
        InputError: where there is none, or they are of different models.

    >>> averaged([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    {'w': tensor([2.])}
    """
    if not states or any(state.keys() != states[0].keys() for state in states):
        raise InputError(f"states: expected states of one model, at least one, got {len(states)}")
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if last.is_floating_point() else last.clone()
        for name, last in states[-1].items()
    }
