"""Fine-tuning with P fixed, and the choice of P.

Source: Milbauer et al. (2023), arXiv 2305.19585.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.reduce.lait.heads import LAITClassifier, LAITSeq2Seq


class Swept(NamedTuple):
    """What was measured of each P, and the one that is chosen."""

    values: dict[int, float]
    chosen: int


def fine_tune_lait(
    model: LAITClassifier | LAITSeq2Seq,
    input_ids: Int[Tensor, "items segments length"],
    mask: Bool[Tensor, "items segments length"],
    target: Int[Tensor, "items *tokens"],
    *,
    steps: int,
    batch: int = 32,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    random_state: int = 0,
) -> tuple[float, ...]:
    """Train by the task's loss alone, from what the model is; P is the model's. Left in eval mode.

    Args:
        model: trained in place.
        input_ids, mask: of the segments.
        target: classes, or tokens of the label texts.
        steps: the same for every P that is compared.
        batch, lr, weight_decay: of AdamW; the rate falls in a line.
        random_state: of order and dropout.

    Returns:
        The losses, step by step.
    """
    require_at_least(1, steps=steps, batch=batch)
    require_positive(lr=lr)
    if len(target) != len(input_ids):
        raise InputError(f"target: expected {len(input_ids)} as input_ids, got {len(target)}")
    stepper = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(random_state)
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        while len(losses) < steps:
            for chosen in torch.randperm(len(target), generator=generator).split(batch):
                loss = model.loss(input_ids[chosen], mask[chosen], target[chosen])
                stepper.zero_grad(set_to_none=True)
                loss.backward()
                stepper.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if len(losses) == steps:
                    break
    model.eval()
    return tuple(losses)


def sweep_splits(measure: Callable[[int], float], splits: Iterable[int], tolerance: float) -> Swept:
    """Measure each P on validation data, and choose.

    Args:
        measure: of P, larger is better.
        splits: which.
        tolerance: see `largest_split`.

    >>> sweep_splits({0: 0.9, 4: 0.89, 6: 0.5}.__getitem__, (0, 4, 6), tolerance=0.02).chosen
    4
    """
    values = {split: measure(split) for split in splits}
    return Swept(values, largest_split(values, tolerance))


def largest_split(values: Mapping[int, float], tolerance: float) -> int:
    """The largest P whose value is at most `tolerance` below the best.

    >>> largest_split({0: 0.9, 2: 0.91, 4: 0.9}, tolerance=0.0)
    2
    """
    require_at_least(0, tolerance=tolerance)
    if not values:
        raise InputError("values: expected what was measured of at least one P")
    best = max(values.values())
    return max(split for split, value in values.items() if value >= best - tolerance)
