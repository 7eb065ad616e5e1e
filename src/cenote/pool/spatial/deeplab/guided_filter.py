"""The guided filter: a cheap rival of the dense CRF, linear in the pixels and without iterations."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_positive


def guided_filter(
    maps: Float[Tensor, "batch channels height width"],
    image: Shaped[Tensor, "batch colours height width"],
    radius: int = 8,
    eps: float = 100.0,
) -> Float[Tensor, "batch channels height width"]:
    """Maps of scores, smoothed where the image is flat and kept sharp at its edges.

    In each window of `(2 radius + 1)^2` pixels, with `I` the mean of the colours: `a = cov(I, p) / (var(I) + eps)`,
    `b = mean(p) - a mean(I)`; `q = mean(a) I + mean(b)`, the means over all windows that a pixel lies in. Windows are cut at
    the border of the image.

    Args:
        maps: `p`, probabilities or a heat map.
        image: at the size of the maps, colours from 0 to 255.
        radius: of a window, in pixels.
        eps: in squared units of the image; variances far below it count as flat.

    Returns:
        The maps; channels that sum to 1 still do, but a value may leave 0 to 1 by a little.

    Raises:
        InputError: where image and maps differ in size, or a number is out of range.

    Example:
        >>> guided_filter(torch.rand(1, 2, 9, 12).softmax(1), torch.randint(256, (1, 3, 9, 12))).shape
        torch.Size([1, 2, 9, 12])

    Source: He, Sun, Tang, "Guided Image Filtering", ECCV 2010, with a grey guide.
    """
    require_at_least(1, radius=radius)
    require_positive(eps=eps)
    if maps.dim() != 4 or image.dim() != 4 or image.shape[0] != maps.shape[0] or image.shape[2:] != maps.shape[2:]:
        raise InputError(
            f"image: expected [batch, colours, height, width] to go with maps {tuple(maps.shape)}, got {tuple(image.shape)}"
        )

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)

    guide = image.to(maps.dtype).mean(1, keepdim=True)
    # around the mean of each image: of large numbers the variance would lose its digits
    guide = guide - guide.mean((2, 3), keepdim=True)
    centre, level = mean(guide), mean(maps)
    a = (mean(guide * maps) - centre * level) / (mean(guide * guide) - centre * centre + eps)
    return mean(a) * guide + mean(level - a * centre)
