"""Steps of an optimiser whose rate rises and falls, as the papers of this room describe their training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_rate
from cenote.mix.fitting import in_training


def trained(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    warm_up: float = 0.0,
    falls_to: float = 1.0,
    clip: float | None = None,
) -> list[float]:
    """Steps of an optimiser, its rate rising in a line and falling along a cosine; the model is left in eval mode.

    Args:
        loss: of the batch of each step, from 0.
        steps: how many.
        warm_up: share of the steps in which the rate rises.
        falls_to: share of the rate that is left at the end; 1 for a rate that stays.
        clip: largest norm of the gradient.

    Returns:
        The loss of every step.

    Raises:
        InputError: where a loss is not finite.
    """
    require_at_least(1, steps=steps)
    require_rate(warm_up=warm_up)
    rises = round(warm_up * steps)

    def factor(step: int) -> float:
        if step < rises:
            return (step + 1) / rises
        done = (step - rises) / max(1, steps - rises)
        return falls_to + (1 - falls_to) * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    with in_training(model):
        for step in range(steps):
            value = loss(step)
            if not bool(value.isfinite()):
                raise InputError(f"loss: is {float(value.detach())} at step {step}; try a smaller rate")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            losses.append(float(value.detach()))
    return losses
