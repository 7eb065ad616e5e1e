"""What joint attention is trained towards, and how its maps are read."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.requirements import require_positive


def gaussian_target(
    points: Float[Tensor, "batch points 2"],
    size: tuple[int, int],
    sigma: float = 10.0,
    mask: Bool[Tensor, "batch points"] | None = None,
) -> Float[Tensor, "batch 1 height width"]:
    """`min(1, sum over points of exp(-d^2 / 2 sigma^2))` at every pixel, with `d` in pixels.

    Args:
        points: `(x, y)` in `[0, 1]`, where people look.
        size: height and width.
        sigma: in pixels; 10 at the authors' 320 x 640.
        mask: True on points that count.

    Example:
        >>> gaussian_target(torch.tensor([[[0.5, 0.5]]]), (4, 4), sigma=1.0)[0, 0, 2, 2].item()
        1.0

    Source: Nakatani, Kawashima, Ukita, ICCV 2023. Train with the mean squared error.
    """
    require_positive(sigma=sigma)
    height, width = size
    across = torch.arange(width, device=points.device) - points[..., :1] * width
    down = torch.arange(height, device=points.device) - points[..., 1:] * height
    hill = torch.exp(-(down.square().unsqueeze(-1) + across.square().unsqueeze(-2)) / (2 * sigma**2))
    if mask is not None:
        hill = hill.masked_fill(~mask[..., None, None], 0)
    return hill.sum(1, keepdim=True).clamp(max=1)


def best_point(maps: Float[Tensor, "*maps height width"]) -> Float[Tensor, "*maps 2"]:
    """`(x, y)` in `[0, 1)` of the largest value of each map.

    Args:
        maps: `[..., height, width]`; of equal values the first one counts, row by row.

    >>> best_point(torch.eye(4)[1].view(1, 2, 2)).tolist()
    [[0.5, 0.0]]
    """
    height, width = maps.shape[-2:]
    best = maps.flatten(-2).argmax(-1)
    return torch.stack([best % width / width, best // width / height], -1).to(maps.dtype)
