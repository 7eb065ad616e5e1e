"""How short a text becomes, whether it is cut where words end, and what a step costs.

Source: Nawrot et al. (2023), arXiv 2211.09761.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.reduce.dynamic_token_pooling.model import HourglassLM, objective


class Shortening(NamedTuple):
    """Characters per cut (infinite without one), share of the characters that are cuts."""

    factor: float
    rate: float


class BoundaryScores(NamedTuple):
    """Of cuts against those that are wanted; 0 where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float


class StepCost(NamedTuple):
    """Of one step of training: seconds, and bytes at the peak on a GPU, elsewhere of what is kept for the way back."""

    seconds: float
    bytes: int


def shortening_of(
    boundaries: Bool[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Shortening:
    """Mean shortening factor and boundary rate.

    >>> shortening_of(torch.tensor([[False, True, False, True]]))
    Shortening(factor=2.0, rate=0.5)
    """
    real = torch.ones_like(boundaries) if mask is None else mask
    cuts, characters = int((boundaries & real).sum()), int(real.sum())
    if not characters:
        raise InputError("mask: expected at least one real token")
    return Shortening(characters / cuts if cuts else math.inf, cuts / characters)


def boundary_scores(
    boundaries: Bool[Tensor, "batch tokens"],
    wanted: Bool[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> BoundaryScores:
    """Precision, recall and F1 of cuts, against spaces say.

    >>> boundary_scores(torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])).precision
    0.5
    """
    if boundaries.shape != wanted.shape:
        raise InputError(f"wanted: expected {list(boundaries.shape)} as the boundaries, got {list(wanted.shape)}")
    real = torch.ones_like(boundaries) if mask is None else mask
    both, found, there = (int((cuts & real).sum()) for cuts in (boundaries & wanted, boundaries, wanted))
    return BoundaryScores(both / max(found, 1), both / max(there, 1), 2 * both / max(found + there, 1))


def step_cost(
    model: HourglassLM,
    data: Int[Tensor, "batch tokens"],
    target: Int[Tensor, "batch tokens"],
    boundaries: Bool[Tensor, "batch tokens"] | None = None,
    repeats: int = 3,
) -> StepCost:
    """Forward and backward; the fastest of some runs. Gradients are left as they were.

    Args:
        model: as it is.
        data, target, boundaries: as for the model.
        repeats: how many runs.
    """
    require_at_least(1, repeats=repeats)
    parameters = [p for p in model.parameters() if p.requires_grad]
    known = {p.data_ptr() for p in parameters}
    times, held = [], 0
    on_gpu = data.device.type == "cuda"
    for _ in range(repeats):
        kept: dict[int, int] = {}

        def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            # views of one block are one block
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        if on_gpu:
            torch.cuda.reset_peak_memory_stats(data.device)
            torch.cuda.synchronize(data.device)
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = objective(model(data, target, boundaries))
        torch.autograd.grad(loss, parameters, allow_unused=True)
        if on_gpu:
            torch.cuda.synchronize(data.device)
        times.append(time.perf_counter() - start)
        held = max(held, torch.cuda.max_memory_allocated(data.device) if on_gpu else sum(kept.values()))
    return StepCost(min(times), held)
