"""The loop with which models of this room are trained: several optimisers, the best epoch by validation, an early stop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least


@dataclass(frozen=True)
class Fitted:
    """How a training went.

    Attributes:
        losses: step by step.
        scores: of each epoch, where a score was given.
        best: the epoch whose parameters the model has, from 0; the last without a score.
    """

    losses: tuple[float, ...]
    scores: tuple[float, ...]
    best: int


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Train mode within, and eval mode behind, after an exception too."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def fit(
    model: nn.Module,
    items: int,
    loss: Callable[[Int[Tensor, "chosen"]], Tensor],
    steppers: Sequence[torch.optim.Optimizer] | Callable[[int], Sequence[torch.optim.Optimizer]],
    *,
    epochs: int,
    batch: int,
    score: Callable[[], float] | None = None,
    patience: int | None = None,
    random_state: int = 0,
) -> Fitted:
    """Train a model on losses of its batches; it is left in eval mode, where a loss raises too.

    Args:
        model: to train.
        items: how many there are.
        loss: of the items of these numbers, with the model as it then is.
        steppers: optimisers of its parameters; all step. Or from an epoch to those of this epoch, called as it begins.
        epochs, batch: as usual.
        score: after each epoch, in eval mode, larger is better; the first of the best epochs is kept. `None`: the last.
        patience: epochs without a better score behind which it ends; None for all epochs.
        random_state: of the order of the items and of dropout; global generators are left as they were.

    Raises:
        InputError: where there are no items, or a loss is not finite.
    """
    require_at_least(1, items=items, epochs=epochs, batch=batch)
    if patience is not None:
        require_at_least(1, patience=patience)
    order = torch.Generator().manual_seed(random_state)
    losses: list[float] = []
    scores: list[float] = []
    best = epochs - 1
    kept: dict[str, Tensor] | None = None
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        for epoch in range(epochs):
            with in_training(model):
                now = steppers(epoch) if callable(steppers) else steppers
                for chosen in torch.randperm(items, generator=order).split(batch):
                    value = loss(chosen)
                    if not bool(value.isfinite()):
                        raise InputError(f"loss: is {float(value.detach())} at step {len(losses)}; try a smaller lr")
                    for stepper in now:
                        stepper.zero_grad(set_to_none=True)
                    value.backward()
                    for stepper in now:
                        stepper.step()
                    losses.append(float(value.detach()))
            if score is None:
                continue
            with torch.no_grad():
                scores.append(score())
            if scores[-1] > max(scores[:-1], default=-float("inf")):
                best, kept = epoch, copy.deepcopy(model.state_dict())
            elif patience is not None and epoch - best >= patience:
                break
    if kept is not None:
        model.load_state_dict(kept)
    model.zero_grad(set_to_none=True)
    return Fitted(tuple(losses), tuple(scores), best)
