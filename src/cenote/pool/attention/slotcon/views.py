"""Two crops of every image, and the way back from score maps of the crops to the places that both show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least


class View(NamedTuple):
    """One crop of each image.

    Attributes:
        x: `[batch, channels, size, size]`.
        box: `[batch, 4]`: `(x1, y1, x2, y2)` in `[0, 1]`, the part of this crop that the other one shows, in this crop's own
            coordinates (after its flip).
        flip: `[batch]`, whether the crop is mirrored left to right.
    """

    x: Float[Tensor, "batch channels height width"]
    box: Float[Tensor, "batch 4"]
    flip: Bool[Tensor, "batch"]


def crop(
    images: Float[Tensor, "batch channels height width"],
    box: Float[Tensor, "batch 4"],
    flip: Bool[Tensor, "batch"],
    size: tuple[int, int],
) -> Float[Tensor, "batch channels out_height out_width"]:
    """The part of each image inside its box, resized bilinearly to `size`, then mirrored where told.

    A box that covers `size` whole pixels gives these pixels.
    """
    return F.grid_sample(images, _grid(box, flip, size), mode="bilinear", padding_mode="border", align_corners=False)


def overlap(
    first: Float[Tensor, "batch 4"], second: Float[Tensor, "batch 4"], flip: Bool[Tensor, "batch"]
) -> Float[Tensor, "batch 4"]:
    """What of `first` lies in `second`, in the coordinates of `first`, mirrored where the crop is.

    >>> overlap(torch.tensor([[0.0, 0.0, 0.5, 0.5]]), torch.tensor([[0.25, 0.0, 0.75, 0.5]]), torch.tensor([True])).tolist()
    [[0.0, 0.0, 0.5, 1.0]]
    """
    corner = torch.maximum(first[:, :2], second[:, :2])
    end = torch.minimum(first[:, 2:], second[:, 2:])
    extent = first[:, 2:] - first[:, :2]
    x1, y1 = ((corner - first[:, :2]) / extent).clamp(0, 1).unbind(1)
    x2, y2 = ((end - first[:, :2]) / extent).clamp(0, 1).unbind(1)
    return torch.stack([torch.where(flip, 1 - x2, x1), y1, torch.where(flip, 1 - x1, x2), y2], 1)


def inverse_augment(
    maps: Float[Tensor, "batch channels height width"],
    box: Float[Tensor, "batch 4"],
    flip: Bool[Tensor, "batch"],
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "batch channels out_height out_width"]:
    """Cut maps of a crop to what both crops show, and undo the mirroring: places of two views then correspond.

    This is RoIAlign with aligned corners and one box per map, which here comes down to one bilinear sample in the middle
    of each bin, since no box is larger than its map.

    Args:
        maps: of one view, on any grid.
        box, flip: of that view.
        size: of the result; default: that of the maps.
    """
    height, width = maps.shape[2:] if size is None else size
    return crop(maps, box, flip, (height, width))


class TwoCrops:
    """Draw two overlapping crops of every image of a batch.

    Args:
        size: of a crop in pixels.
        scale: least and largest area of a crop as a share of the image.
        ratio: least and largest width / height of a crop.
        flip: probability of mirroring a crop.
        least_overlap: least area that both show, as a share of the first crop.
        augment: applied to the pixels of each crop on its own (colour, blur); must not move anything.

    Raises:
        InputError: where the numbers make no crop.

    Example:
        >>> first, second = TwoCrops(16, scale=(0.4, 0.6))(torch.rand(5, 3, 24, 24))
        >>> first.x.shape, first.box.shape
        (torch.Size([5, 3, 16, 16]), torch.Size([5, 4]))

    Source: Wen et al., "Self-Supervised Visual Representation Learning with Semantic Grouping", NeurIPS 2022.
    """

    TRIES = 20

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        least_overlap: float = 0.01,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        require_at_least(1, size=size)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise InputError(f"scale: expected 0 < least <= largest <= 1, got {scale}")
        if not 0 < ratio[0] <= ratio[1]:
            raise InputError(f"ratio: expected 0 < least <= largest, got {ratio}")
        for name, share in (("flip", flip), ("least_overlap", least_overlap)):
            if not 0 <= share <= 1:
                raise InputError(f"{name}: expected a share between 0 and 1, got {share}")
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.flip = flip
        self.least_overlap = least_overlap
        self.augment = augment

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator | None = None
    ) -> tuple[View, View]:
        """Two views of each image; `generator` draws the crops, `augment` draws for itself."""
        aspect = images.shape[2] / images.shape[3]
        first, second = self._boxes(len(images), aspect, generator), self._boxes(len(images), aspect, generator)
        for _ in range(self.TRIES):
            apart = _shared_area(first, second) < self.least_overlap
            if not bool(apart.any()):
                break
            second = torch.where(apart.unsqueeze(1), self._boxes(len(images), aspect, generator), second)
        else:  # no luck: the very same part of the image
            apart = _shared_area(first, second) < self.least_overlap
            second = torch.where(apart.unsqueeze(1), first, second)
        flips = torch.rand(2, len(images), generator=generator) < self.flip
        boxes = [b.to(images) for b in (first, second)]
        views = []
        for own, other, flip in zip(boxes, boxes[::-1], flips.to(images.device), strict=True):
            x = crop(images, own, flip, (self.size, self.size))
            views.append(View(x if self.augment is None else self.augment(x), overlap(own, other, flip), flip))
        return views[0], views[1]

    def _boxes(self, count: int, aspect: float, generator: torch.Generator | None) -> Float[Tensor, "batch 4"]:
        u = torch.rand(4, count, generator=generator)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * u[0]
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = (low + (high - low) * u[1]).exp() * aspect
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        x1, y1 = u[2] * (1 - width), u[3] * (1 - height)
        return torch.stack([x1, y1, x1 + width, y1 + height], 1)


def _grid(
    box: Float[Tensor, "batch 4"], flip: Bool[Tensor, "batch"], size: tuple[int, int]
) -> Float[Tensor, "batch height width 2"]:
    height, width = size
    x1, y1, x2, y2 = (side.view(-1, 1) for side in box.unbind(1))
    across = (torch.arange(width, device=box.device, dtype=box.dtype) + 0.5) / width
    down = (torch.arange(height, device=box.device, dtype=box.dtype) + 0.5) / height
    across = torch.where(flip.unsqueeze(1), 1 - across, across)
    x = (x1 + (x2 - x1) * across).unsqueeze(1).expand(-1, height, -1)
    y = (y1 + (y2 - y1) * down).unsqueeze(2).expand(-1, -1, width)
    return 2 * torch.stack([x, y], -1) - 1


def _shared_area(first: Float[Tensor, "batch 4"], second: Float[Tensor, "batch 4"]) -> Float[Tensor, "batch"]:
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    own = (first[:, 2:] - first[:, :2]).prod(1)
    return sides.clamp(min=0).prod(1) / own
