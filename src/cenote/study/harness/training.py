"""Train the same small network once per seed, all seeds together; or one module by its losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cenote.core.binding import bind
from cenote.study.harness.batches import Data, each, unstacked

Batch = tuple[Any, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Decay = Callable[[float], float]


def cosine(share: float) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * share)) / 2


def constant(_share: float) -> float:
    """1 throughout."""
    return 1.0


def tenth_at_half(share: float) -> float:
    """1, and 0.1 in the second half."""
    return 1.0 if share < 0.5 else 0.1


class Together:
    """One copy of a module per seed; a call runs each copy on its own batch.

    Args:
        build: a fresh module; called once per seed, after seeding.
        seeds: of the initialisations.
        in_turn: run the copies one after the other; faster where the module lives by fused attention.

    Attributes:
        losses: mean over the copies, step by step, of all the training that `fit` has done; a gate reads them.

    Example:
        >>> Together(lambda: torch.nn.Linear(3, 2), (0, 1))(torch.ones(2, 5, 3)).shape
        torch.Size([2, 5, 2])
    """

    def __init__(self, build: Callable[[], nn.Module], seeds: Sequence[int], in_turn: bool = False) -> None:
        modules = [_seeded(build, s) for s in seeds]
        self.base = copy.deepcopy(modules[0])
        self.parameters = {
            k: torch.stack([dict(m.named_parameters())[k].detach() for m in modules]).requires_grad_(p.requires_grad)
            for k, p in modules[0].named_parameters()
        }
        self.buffers = {
            k: torch.stack([dict(m.named_buffers())[k] for m in modules]) for k, _ in self.base.named_buffers()
        }
        self.count = len(modules)
        self.losses: list[float] = []
        self.in_turn = in_turn
        self.copies = [copy.deepcopy(self.base) for _ in modules] if in_turn else []

    def __call__(self, x: Data) -> Float[Tensor, "seeds *out"]:
        """Outputs of each copy on its own inputs, `[seeds, ...]`, which it is given as they are."""

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], own: Data) -> Tensor:
            return torch.func.functional_call(self.base, (parameters, buffers), (own,))

        if self.in_turn:
            outputs = []
            for i, own in enumerate(unstacked(x, self.count)):
                module = self.copies[i].train(self.base.training)
                bind(module, {k: v[i] for k, v in (self.parameters | self.buffers).items()})
                outputs.append(module(own))
            return torch.stack(outputs)
        # fused attention has no rule for vmap and would run copy by copy
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(run, randomness="different")(self.parameters, self.buffers, x)

    def trained(self) -> list[Tensor]:
        """The stacked parameters that are trained."""
        return [p for p in self.parameters.values() if p.requires_grad]

    def module(self, index: int) -> nn.Module:
        """A copy that stands on its own, in eval mode."""
        module = copy.deepcopy(self.base)
        state = {k: v[index].detach() for k, v in (self.parameters | self.buffers).items()}
        module.load_state_dict(state)
        return module.eval()

    def modules(self) -> list[Any]:
        """Every copy on its own, by seed."""
        return [self.module(i) for i in range(self.count)]

    def size(self) -> int:
        """Trained numbers of one copy."""
        return sum(p[0].numel() for p in self.trained())


def fit(
    model: Together,
    batches: Iterable[Batch],
    loss: Loss,
    steps: int,
    lr: float,
    *,
    optimiser: type[torch.optim.Optimizer] = torch.optim.AdamW,
    decay: Decay = cosine,
    own_rates: Mapping[str, float] | None = None,
    **settings: Any,
) -> list[float]:
    """Train all copies for `steps` batches.

    Args:
        model: the copies.
        batches: `(x, y)`, at least `steps` of them; `x` is what the model reads, every tensor of both `[seeds, batch, ...]`.
        loss: a mean over everything that it is given.
        steps: optimiser steps.
        lr: learning rate.
        decay: factor on the learning rate as a function of the share of the steps that are done.
        optimiser: works element by element, so that the copies do not see each other.
        own_rates: name of a parameter -> its own learning rate.
        settings: of the optimiser.

    Returns:
        The mean loss over the copies, step by step.
    """
    model.base.train()
    groups: list[dict[str, Any]] = [
        {"params": [model.parameters[name]], "lr": rate} for name, rate in (own_rates or {}).items()
    ]
    apart = {id(g["params"][0]) for g in groups}
    stepper = cast(Any, optimiser)(
        [{"params": [p for p in model.trained() if id(p) not in apart]}, *groups], lr=lr, **settings
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: decay(step / steps))
    losses = []
    for _, (x, y) in zip(range(steps), batches, strict=False):
        value = loss(model(x), y)
        stepper.zero_grad(set_to_none=True)
        # the sum over the copies of each one's mean, so that each trains as if it were alone
        (value * model.count).backward()
        stepper.step()
        schedule.step()
        losses.append(float(value.detach()))
    model.losses += losses
    return losses


def descend(
    parameters: Iterable[Tensor],
    losses: Iterable[Tensor],
    steps: int,
    lr: float,
    *,
    optimiser: type[torch.optim.Optimizer] = torch.optim.Adam,
    clip: float | None = None,
    **settings: Any,
) -> list[float]:
    """Train one module, a step for each loss; the learning rate falls to zero along a cosine.

    Args:
        parameters: of the module.
        losses: each computed when it is asked for, with the parameters as they then are.
        steps: how many losses there are.
        lr: first learning rate.
        optimiser: its class.
        clip: largest norm of the gradient.
        settings: of the optimiser.

    Returns:
        The losses, step by step.
    """
    trained = list(parameters)
    stepper = cast(Any, optimiser)(trained, lr=lr, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, steps)
    curve = []
    for loss in losses:
        curve.append(float(loss.detach()))
        stepper.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        stepper.step()
        schedule.step()
    return curve


def shuffled(
    items: int, batch: int, passes: int, generator: torch.Generator | None = None
) -> Iterator[Int[Tensor, "chosen"]]:
    """Numbers of the items of each batch, in a fresh order in every pass.

    >>> [len(chosen) for chosen in shuffled(5, 2, passes=2)]
    [2, 2, 1, 2, 2, 1]
    """
    for _ in range(passes):
        yield from torch.randperm(items, generator=generator).split(batch)


def epochs(x: Data, y: Tensor, batch: int, seeds: Sequence[int]) -> Iterator[tuple[Data, Tensor]]:
    """Batches without end of `[seeds, items, ...]`, each seed's items in its own order.

    What does not fill a batch is left out of that epoch.
    """
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    items = y.shape[1]
    batch = min(batch, items)
    rows = torch.arange(len(seeds)).unsqueeze(1)
    while True:
        order = torch.stack([torch.randperm(items, generator=g) for g in generators])
        for start in range(0, items - batch + 1, batch):
            chosen = order[:, start : start + batch]
            yield each((x, y), lambda t, chosen=chosen: t[rows, chosen])  # type: ignore[misc]


def steps_of(items: int, batch: int, passes: int) -> int:
    """Number of batches that `epochs` gives in so many passes over the items."""
    return passes * (items // min(batch, items))


def cross_entropy(logits: Float[Tensor, "seeds batch classes"], y: Int[Tensor, "seeds batch"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over seeds and items."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@torch.no_grad()
def outputs(model: Together, x: Data, batch: int = 512) -> Float[Tensor, "seeds items *out"]:
    """Of trained copies, in eval mode, so many items at a time."""
    model.base.eval()
    items = (x if isinstance(x, Tensor) else x[0]).shape[1]
    parts = (each(x, lambda t, i=i: t[:, i : i + batch]) for i in range(0, items, batch))  # type: ignore[misc]
    return torch.cat([model(part) for part in parts], 1)


def accuracy(model: Together, x: Data, y: Int[Tensor, "seeds items"], batch: int = 512) -> tuple[float, ...]:
    """Share of items whose class is named rightly, per seed."""
    return tuple((outputs(model, x, batch).argmax(-1) == y).double().mean(1).tolist())


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
