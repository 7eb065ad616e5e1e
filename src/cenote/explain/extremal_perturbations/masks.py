"""Smooth masks, pyramids of a perturbed image, and the area of a mask as a constraint.

Written from the equations; what the authors published with them may not be used commercially, and was not used here.

Source: Fong, Patrick and Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks" (2019),
arXiv 1910.08485.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive

Perturbing = Literal["blur", "fade"]
Smoothing = Literal["smooth maximum", "maximum", "sum", "sigmoid"]

LEVELS = 8
BLUR = 20.0
"""Standard deviation of the most blurred level, in pixels."""
COLDNESS = 20.0
WINDOW = 4
"""Half width of a Gaussian, in standard deviations."""


def gaussian_blur(x: Float[Tensor, "*batch height width"], std: float) -> Float[Tensor, "*batch height width"]:
    """A separable Gaussian whose taps sum to one, with a border of zeros.

    Args:
        x: images, feature maps or masks.
        std: in pixels; 0 leaves them as they are.

    >>> gaussian_blur(torch.ones(1, 9, 9), 1.0)[0, 4, 4].item() > 0.999
    True
    """
    require_at_least(0, std=std)
    if std == 0:
        return x
    half = math.ceil(WINDOW * std)
    taps = torch.arange(-half, half + 1, dtype=x.dtype, device=x.device)
    taps = torch.exp(-(taps**2) / (2 * std**2))
    taps = taps / taps.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    down = F.conv2d(flat, taps[None, None, :, None], padding=(half, 0))
    return F.conv2d(down, taps[None, None, None, :], padding=(0, half)).view(x.shape)


class Pyramid:
    """An image from nothing to itself, and what a mask leaves of it.

    `y_l`, l = 0 ... L - 1, with `t_l = l / (L - 1)`: blurred by `20 (1 - t_l)` pixels, or `t_l x`. A mask value m lies between
    two levels, `s = m (L - 1)`: `(1 - s + floor(s)) y_floor(s) + (s - floor(s)) y_(floor(s) + 1)`.

    Args:
        image: one image.
        perturbing: `"blur"`, or `"fade"` to zero.
        levels: L.
        blur: standard deviation of level 0, in pixels.

    Example:
        >>> image = torch.rand(3, 6, 6)
        >>> pyramid = Pyramid(image, "fade")
        >>> bool((pyramid(torch.ones(1, 1, 6, 6))[0] == image).all())
        True
    """

    def __init__(
        self,
        image: Float[Tensor, "channels height width"],
        perturbing: Perturbing = "blur",
        levels: int = LEVELS,
        blur: float = BLUR,
    ) -> None:
        require_one_of(get_args(Perturbing), perturbing=perturbing)
        require_at_least(2, levels=levels)
        require_positive(blur=blur)
        shares = [level / (levels - 1) for level in range(levels)]
        images = [gaussian_blur(image, (1 - t) * blur) if perturbing == "blur" else t * image for t in shares]
        self.levels: Float[Tensor, "levels channels height width"] = torch.stack(images)

    def __call__(self, mask: Float[Tensor, "masks 1 height width"]) -> Float[Tensor, "masks channels height width"]:
        """The image under each mask, with a gradient at the mask."""
        if mask.shape[-2:] != self.levels.shape[-2:]:
            raise InputError(
                f"mask: expected {list(self.levels.shape[-2:])} pixels as the image, got {list(mask.shape[-2:])}"
            )
        last = len(self.levels) - 1
        at = mask * last
        below = at.detach().floor().long().clamp(0, last)
        above = (below + 1).clamp(max=last)
        share = at - below
        return (1 - share) * self._level(below) + share * self._level(above)

    def _level(self, number: Tensor) -> Tensor:
        masks, _, height, width = number.shape
        channels = self.levels.shape[1]
        flat = self.levels.reshape(len(self.levels), -1)
        index = number.expand(-1, channels, -1, -1).reshape(masks, -1)
        return flat.gather(0, index).view(masks, channels, height, width)


class SmoothMask(nn.Module):
    """Masks that are smooth by how they are made: each pixel takes a smooth maximum over parameters around it.

    `m(u) = sum_i v_i(u) softmax_i(20 v_i(u))`, `v_i(u) = k(|u - u_i| / sigma) p_i`, `k(z) = exp(-2 max(z - 1/2, 0)^2)`, over
    the parameters `p_i` that lie on a grid; then clamped to [0, 1].

    Args:
        height, width: of the image.
        step: pixels between parameters.
        sigma: reach of a parameter in pixels, a multiple of `step`.
        smoothing: `"smooth maximum"`, `"maximum"`, `"sum"`, or `"sigmoid"` of `20 sum_i v_i - 3`.

    Example:
        >>> masks = SmoothMask(14, 14, step=7, sigma=14)
        >>> full, inside = masks(torch.zeros(2, 1, *masks.grid))
        >>> full.shape, inside.shape, bool(inside.any())
        (torch.Size([2, 1, 36, 36]), torch.Size([2, 1, 14, 14]), False)
    """

    weight: Tensor

    def __init__(
        self, height: int, width: int, step: int = 7, sigma: int = 21, smoothing: Smoothing = "smooth maximum"
    ) -> None:
        super().__init__()
        require_at_least(1, height=height, width=width, step=step, sigma=sigma)
        require_one_of(get_args(Smoothing), smoothing=smoothing)
        if sigma % step:
            raise InputError(f"sigma: expected a multiple of step={step}, got {sigma}; the mask would be too small")
        self.size, self.step, self.sigma, self.smoothing = (height, width), step, sigma, smoothing
        self.grid = (math.ceil(height / step), math.ceil(width / step))
        """Rows and columns of the parameters."""
        self.padding = 1 + math.ceil(2 * sigma / step)
        self.window = 2 * (1 + math.ceil(sigma / step)) + 1
        rows, columns = ((cells + 2 * self.padding - self.window) * step + 1 for cells in self.grid)
        squared = self._offsets(rows)[:, None, :, None] + self._offsets(columns)[None, :, None, :]
        distance = squared.sqrt() / sigma
        weight = torch.exp(-2 * (distance - 0.5).clamp(min=0) ** 2)
        self.register_buffer("weight", weight.reshape(-1, rows, columns).float(), persistent=False)

    def _offsets(self, pixels: int) -> Float[Tensor, "window pixels"]:
        """Squared distance of each pixel to each parameter of its window, along one axis."""
        at = torch.arange(pixels, dtype=torch.float64)
        cell = at.div(self.step, rounding_mode="floor") + torch.arange(self.window)[:, None] - self.padding
        return (at - (self.sigma + self.step * cell)) ** 2

    def forward(
        self, parameters: Float[Tensor, "masks 1 rows columns"]
    ) -> tuple[Float[Tensor, "masks 1 full_height full_width"], Float[Tensor, "masks 1 height width"]]:
        """The whole mask, that reaches beyond the image, and the part that lies on the image."""
        if tuple(parameters.shape[-2:]) != self.grid:
            raise InputError(f"parameters: expected {list(self.grid)}, got {list(parameters.shape[-2:])}")
        rows, columns = self.weight.shape[-2:]
        cells = F.unfold(parameters, self.window, padding=self.padding)
        middle = (len(parameters), -1, (rows - 1) // self.step + 1, (columns - 1) // self.step + 1)
        near = cells.view(middle).repeat_interleave(self.step, 2).repeat_interleave(self.step, 3)
        full = self._smoothed(self.weight.to(parameters) * near[..., :rows, :columns]).clamp(0, 1).unsqueeze(1)
        height, width = self.size
        return full, full[..., self.sigma : self.sigma + height, self.sigma : self.sigma + width]

    def _smoothed(self, v: Float[Tensor, "masks window h w"]) -> Float[Tensor, "masks h w"]:
        if self.smoothing == "smooth maximum":
            return (v * (COLDNESS * v).softmax(1)).sum(1)
        if self.smoothing == "maximum":
            return v.amax(1)
        total = v.sum(1)
        return total if self.smoothing == "sum" else (COLDNESS * total - 3).sigmoid()


def ranked_area(mask: Float[Tensor, "masks *units"], areas: Sequence[float]) -> Float[Tensor, "masks"]:
    """How far each mask is from one that is 1 on the share `a` of its units and 0 elsewhere: `mean((sorted(m) - r_a)^2)`.

    `r_a` is 0 at the first `floor(n (1 - a))` places and 1 behind; the value is 0 only if the mask has that area and no grey.

    Args:
        mask: one per area.
        areas: shares, above 0 up to 1.

    >>> ranked_area(torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), [0.25, 0.75]).tolist()
    [0.0, 0.25]
    """
    require_areas(areas)
    ranked = mask.flatten(1).sort(1).values
    if len(ranked) != len(areas):
        raise InputError(f"areas: expected one per mask, {len(ranked)}, got {len(areas)}")
    units = ranked.shape[1]
    zeros = torch.tensor([math.floor(units * (1 - a)) for a in areas], device=mask.device)
    reference = (torch.arange(units, device=mask.device) >= zeros[:, None]).to(ranked)
    return ((ranked - reference) ** 2).mean(1)


def require_areas(areas: Sequence[float]) -> None:
    """Raise `InputError` unless areas are shares, above 0 up to 1, at least one."""
    if not areas or not all(0 < a <= 1 for a in areas):
        raise InputError(f"areas: expected shares above 0, up to 1, at least one, got {list(areas)}")
