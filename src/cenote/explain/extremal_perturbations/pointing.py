"""What a map of an image is worth: where it points, and what it keeps at a given area."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.explain.extremal_perturbations.masks import BLUR, LEVELS, Perturbing, Pyramid, gaussian_blur, require_areas
from cenote.explain.images import Scores

POINTING_AREAS = (0.025, 0.05, 0.1, 0.2)
SMOOTHING = 0.09
"""Standard deviation over the shorter side."""
TOLERANCE = 15 / 224
"""Pixels of distance that count as a hit, over the shorter side."""


def summed(
    masks: Float[Tensor, "areas 1 height width"], size: tuple[int, int] | None = None, smoothing: float = SMOOTHING
) -> Float[Tensor, "h w"]:
    """Masks of several areas as one map: made as large as the image, smoothed, summed.

    Args:
        masks: one per area, those of `POINTING_AREAS` in the paper.
        size: height and width of the image; that of the masks by default.
        smoothing: standard deviation over the shorter side.
    """
    size = size or (int(masks.shape[2]), int(masks.shape[3]))
    large = F.interpolate(masks, size, mode="bilinear", align_corners=False)
    return gaussian_blur(large[:, 0], smoothing * min(size)).sum(0)


def points_at(
    scores: Float[Tensor, "height width"], thing: Bool[Tensor, "height width"], tolerance: float | None = None
) -> bool:
    """The pointing game: whether the largest score lies on a thing, or near it.

    Args:
        scores: a map; the first of equal ones counts.
        thing: where it is.
        tolerance: distance in pixels that counts as a hit; by default 15 of an image of 224 pixels, smaller in smaller ones.

    >>> thing = torch.zeros(4, 8, dtype=torch.bool)
    >>> thing[:, :2] = True
    >>> points_at(torch.eye(8)[[1, 1, 0, 0]], thing, 0.0), points_at(torch.eye(8)[[7, 7, 7, 7]], thing, 2.0)
    (True, False)
    """
    if scores.shape != thing.shape or not bool(thing.any()):
        raise InputError(f"thing: expected {list(scores.shape)} with a pixel of it, got {list(thing.shape)}")
    within = TOLERANCE * min(scores.shape) if tolerance is None else tolerance
    row, column = divmod(int(scores.flatten().argmax()), scores.shape[1])
    places = thing.nonzero().double()
    nearest = (places - torch.tensor([row, column], dtype=torch.float64, device=places.device)).norm(dim=1).min()
    return bool(nearest <= within)


def top_area(scores: Float[Tensor, "height width"], area: float) -> Float[Tensor, "height width"]:
    """The mask of ones on the pixels with the largest scores, of a given share.

    >>> top_area(torch.tensor([[0.1, 0.9], [0.5, 0.2]]), 0.5).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    require_areas([area])
    order = scores.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros_like(scores).flatten()
    mask[order[: round(area * len(order))]] = 1
    return mask.view(scores.shape)


@torch.no_grad()
def kept_probability(
    scores: Scores,
    image: Float[Tensor, "channels height width"],
    target: int,
    masks: Float[Tensor, "masks height width"],
    perturbing: Perturbing = "blur",
    levels: int = LEVELS,
    blur: float = BLUR,
) -> Float[Tensor, "masks"]:
    """The target's probability with only what each mask keeps."""
    pyramid = Pyramid(image, perturbing, levels, blur)
    return scores(pyramid(masks.unsqueeze(1))).softmax(1)[:, target]


def area_error(masks: Float[Tensor, "masks *units"], area: float) -> Float[Tensor, "masks"]:
    """By how much the share that each mask keeps differs from the one asked for.

    >>> area_error(torch.tensor([[1.0, 0.0], [0.5, 1.0]]), 0.5).tolist()
    [0.0, 0.25]
    """
    return (masks.flatten(1).mean(1) - area).abs()
