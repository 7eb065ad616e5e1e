"""The region that weights point at, and how well it fits an object; whatever made the weights, a pool or a model's own head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError


class ObjectScores(NamedTuple):
    """How well the weights of each image fit its object.

    Attributes:
        hit: 1 where the largest weight lies on the object, else 0.
        mass: share of the weights on the object.
        mask_iou: intersection over union of `region` with the object.
        box_iou: that of the boxes around both.
    """

    hit: Float[Tensor, "batch"]
    mass: Float[Tensor, "batch"]
    mask_iou: Float[Tensor, "batch"]
    box_iou: Float[Tensor, "batch"]


def region(weights: Float[Tensor, "*maps height width"], share: float = 0.6) -> Bool[Tensor, "*maps height width"]:
    """The heaviest places that together hold `share` of the weights: as few as will do.

    Args:
        weights: not negative, on a grid; of a pool `attend(x).weights.unflatten(-1, grid)`, of a model its class token's row.
        share: between 0 and 1.

    Raises:
        InputError: where the share is no share.

    >>> region(torch.tensor([[0.5, 0.3], [0.1, 0.1]]), 0.7).tolist()
    [[True, True], [False, False]]
    """
    if not 0 < share <= 1:
        raise InputError(f"share: expected a number above 0 and up to 1, got {share}")
    flat = weights.flatten(-2)
    heaviest, order = flat.sort(dim=-1, descending=True, stable=True)
    before = heaviest.cumsum(-1) - heaviest
    kept = (before < share * flat.sum(-1, keepdim=True)) & (heaviest > 0)
    return torch.zeros_like(kept).scatter(-1, order, kept).unflatten(-1, weights.shape[-2:])


def box_around(mask: Bool[Tensor, "*maps height width"]) -> Float[Tensor, "*maps four"]:
    """`(x1, y1, x2, y2)` in `[0, 1]` around what is True; zeros where nothing is.

    >>> box_around(torch.tensor([[False, False], [False, True]])).tolist()
    [0.5, 0.5, 1.0, 1.0]
    """
    sides = []
    for there in (mask.any(-2), mask.any(-1)):
        length = there.shape[-1]
        first, last = there.int().argmax(-1), length - there.flip(-1).int().argmax(-1)
        some = there.any(-1)
        sides.append([torch.where(some, first, 0) / length, torch.where(some, last, 0) / length])
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], -1)


def mask_iou(first: Bool[Tensor, "batch *places"], second: Bool[Tensor, "batch *places"]) -> Float[Tensor, "batch"]:
    """Intersection over union; 1 where both are empty."""
    a, b = first.flatten(1), second.flatten(1)
    either = (a | b).sum(1)
    return torch.where(either > 0, (a & b).sum(1) / either.clamp(min=1), 1.0)


def box_iou(first: Float[Tensor, "batch four"], second: Float[Tensor, "batch four"]) -> Float[Tensor, "batch"]:
    """Intersection over union of boxes; 1 where both are empty.

    >>> box_iou(torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])).tolist()
    [0.5]
    """
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    both = sides.clamp(min=0).prod(1)
    either = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - both
    return torch.where(either > 0, both / either.clamp(min=torch.finfo(both.dtype).tiny), 1.0)


def object_scores(
    weights: Float[Tensor, "batch height width"], truth: Bool[Tensor, "batch height width"], share: float = 0.6
) -> ObjectScores:
    """Compare where weights lie with where the object is.

    Args:
        weights: of each image, on a grid, as for `region`.
        truth: True on the object, on the same grid.
        share: see `region`.

    Raises:
        InputError: where the grids differ or an image has no object.
    """
    if weights.shape != truth.shape or not bool(truth.flatten(1).any(1).all()):
        raise InputError(
            f"truth: expected a mask {tuple(weights.shape)} with an object in every image, got {tuple(truth.shape)}"
        )
    flat, inside = weights.flatten(1), truth.flatten(1)
    found = region(weights, share)
    return ObjectScores(
        inside.gather(1, flat.argmax(1, keepdim=True)).squeeze(1).to(flat.dtype),
        (flat * inside).sum(1) / flat.sum(1).clamp(min=torch.finfo(flat.dtype).tiny),
        mask_iou(found, truth),
        box_iou(box_around(found), box_around(truth)),
    )
