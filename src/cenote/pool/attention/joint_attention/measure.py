"""How far the point found is from the true one, and what needs no training to find one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.requirements import require_positive
from cenote.core.sets import as_tokens
from cenote.pool.attention.joint_attention.field import coordinates, mean_map
from cenote.pool.attention.joint_attention.targets import best_point


def distance(
    found: Float[Tensor, "batch 2"], truth: Float[Tensor, "batch 2"], size: tuple[int, int]
) -> Float[Tensor, "batch"]:
    """Distance in pixels of points `(x, y)` in `[0, 1]` of images of `size = (height, width)`.

    >>> distance(torch.tensor([[0.5, 0.0]]), torch.tensor([[0.0, 0.0]]), (320, 640)).tolist()
    [320.0]
    """
    height, width = size
    return ((found - truth) * torch.tensor([width, height], dtype=found.dtype, device=found.device)).norm(dim=-1)


def detection_curve(distances: Float[Tensor, "items"], limits: Sequence[float]) -> Float[Tensor, "limits"]:
    """Share of the points that lie within each limit, in pixels; a tenth of the width is the paper's.

    >>> detection_curve(torch.tensor([1.0, 5.0, 20.0, 90.0]), [5.0, 64.0]).tolist()
    [0.5, 0.75]
    """
    return (distances <= torch.tensor(limits, device=distances.device).unsqueeze(1)).to(distances.dtype).mean(1)


def gaze_cones(
    position: Float[Tensor, "batch people 2"],
    gaze: Float[Tensor, "batch people 2"],
    size: tuple[int, int],
    mask: Bool[Tensor, "batch people"] | None = None,
    spread: float = 0.5,
) -> Float[Tensor, "batch 1 height width"]:
    """Mean over the people of `exp(-angle^2 / spread)`, the angle between gaze and the way to a pixel; not trained.

    Args:
        position: of each head, `(x / width, y / height)` in `[0, 1]`.
        gaze: vectors in the axes of the image, in pixels.
        size: height and width.
        mask: True on real people.
        spread: in square radians.
    """
    require_positive(spread=spread)
    height, width = size
    pixels = torch.tensor([width, height], dtype=position.dtype, device=position.device)
    way = (coordinates(size).to(position) - position.unsqueeze(2)) * pixels
    cosine = F.cosine_similarity(way, gaze.unsqueeze(2), dim=-1).clamp(-1, 1)
    return mean_map(torch.exp(-cosine.acos().square() / spread).unflatten(2, size), mask)


def nearest_to_rays(
    position: Float[Tensor, "batch people 2"],
    gaze: Float[Tensor, "batch people 2"],
    size: tuple[int, int],
    mask: Bool[Tensor, "batch people"] | None = None,
) -> Float[Tensor, "batch 2"]:
    """The point `(x, y)` nearest to all lines of sight, by least squares, brought into the image; an untrained rival.

    `(sum_p I - g_p g_p^T) q = sum_p (I - g_p g_p^T) c_p` in pixels; where the lines are parallel, the least solution about the
    mean position.

    Args:
        position, gaze, size, mask: as in `gaze_cones`.

    Example:
        >>> position = torch.tensor([[[0.0, 0.5], [0.5, 0.0]]])
        >>> gaze = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> nearest_to_rays(position, gaze, (32, 64)).tolist()
        [[0.5, 0.5]]
    """
    height, width = size
    pixels = torch.tensor([width, height], dtype=position.dtype, device=position.device)
    people = as_tokens(position * pixels, mask)
    # about their mean, so that what no line decides stays there
    middle = people.mean()
    away = people.values - middle.unsqueeze(1)
    direction = F.normalize(gaze, dim=-1)
    across = torch.eye(2, dtype=position.dtype, device=position.device) - direction.unsqueeze(-1) * direction.unsqueeze(
        -2
    )
    if mask is not None:
        across = across.masked_fill(~mask[..., None, None], 0)
    sums = (across @ away.unsqueeze(-1)).sum(1)
    found = middle + (torch.linalg.pinv(across.sum(1)) @ sums).squeeze(-1)
    return (found / pixels).clamp(0, 1)


def trivial_points(
    position: Float[Tensor, "batch people 2"],
    gaze: Float[Tensor, "batch people 2"],
    size: tuple[int, int],
    mask: Bool[Tensor, "batch people"] | None = None,
) -> dict[str, Float[Tensor, "batch 2"]]:
    """What a model must beat: the middle of the image, the mean position of the people, the point most in their gaze cones.

    Args:
        position, gaze, size, mask: as in `gaze_cones`.
    """
    return {
        "image centre": torch.full_like(position[:, 0], 0.5),
        "mean position": as_tokens(position, mask).mean(),
        "mean gaze cone": best_point(gaze_cones(position, gaze, size, mask)[:, 0]),
    }
