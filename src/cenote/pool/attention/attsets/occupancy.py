"""Reconstruction as AttSets judges it: which voxels are occupied, and how much of it is right by the number of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.pool.attended_region import mask_iou

THRESHOLDS = tuple(n / 20 for n in range(1, 20))


def occupancy_loss(p: Float[Tensor, "batch *voxels"], truth: Float[Tensor, "batch *voxels"]) -> Float[Tensor, ""]:
    """Cross-entropy per voxel: the mean of `-t log(p + 1e-8) - (1 - t) log(1 - p + 1e-8)`.

    >>> round(occupancy_loss(torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 1.0]])).item(), 4)
    0.3466
    """
    return -(truth * (p + 1e-8).log() + (1 - truth) * (1 - p + 1e-8).log()).mean()


def iou(
    p: Float[Tensor, "batch *voxels"], truth: Bool[Tensor, "batch *voxels"], threshold: float = 0.5
) -> Float[Tensor, "batch"]:
    """Intersection over union of the voxels above the threshold with the true ones, of each item; 1 where both are empty.

    >>> iou(torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[True, False, False]])).tolist()
    [0.5]
    """
    return mask_iou(p > threshold, truth)


def best_threshold(
    p: Float[Tensor, "batch *voxels"],
    truth: Bool[Tensor, "batch *voxels"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> float:
    """The threshold of the highest mean IoU, to be found on validation items; of equal ones the lowest."""
    if not thresholds:
        raise InputError("thresholds: expected at least one, got none")
    return max(thresholds, key=lambda t: (float(iou(p, truth, t).mean()), -t))


@torch.no_grad()
def iou_by_views(
    model: Callable[[Tensor], Tensor],
    views: Float[Tensor, "batch views *features"],
    truth: Bool[Tensor, "batch *voxels"],
    counts: Sequence[int],
    threshold: float = 0.5,
) -> dict[int, float]:
    """Mean IoU where the model sees the first 1, 2, ... views.

    Args:
        model: from `[batch, views, ...]` to occupancies in `[0, 1]`.
        views, truth: of the test items.
        counts: numbers of views.
        threshold: see `best_threshold`.

    Raises:
        InputError: where there are fewer views than asked for.
    """
    if not counts or min(counts) < 1 or max(counts) > views.shape[1]:
        raise InputError(f"counts: expected numbers of views from 1 to {views.shape[1]}, got {list(counts)}")
    return {n: float(iou(model(views[:, :n]), truth, threshold).mean()) for n in counts}
