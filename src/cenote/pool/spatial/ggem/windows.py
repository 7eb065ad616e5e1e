from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.powermean import SERIES_BELOW
from cenote.core.segments import accumulation_dtype
from cenote.core.widths import require_divides
from cenote.pool.spatial.base import WindowPool
from cenote.pool.spatial.windows import Size


class GGeMPool(WindowPool):
    """Power mean of each window of a map, with one learnable exponent per group of channels.

    `y_c = ((1/n) sum_i max(a_ic, eps)^p_g)^(1/p_g)` over the `n` cells of a window that lie inside of the map. `p = 1` is the
    mean, large `p` tends to the maximum: a pooling layer that learns how peaky it is. For one vector per map take `GGeM`,
    which accepts `[batch, channels, height, width]` as the set of its cells.

    Use `GGeMPool1d`, `GGeMPool2d` or `GGeMPool3d`: maps of one to three dimensions, with or without a batch.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; cells outside of the map are left out.
        groups: number of contiguous channel groups, a divisor of the channels; 1 is GeM.
        p: initial exponent.
        learnable: whether the exponents are trained.
        eps: smallest value; what is below, negative values too, is raised to it.

    Raises:
        InputError: where an argument is out of range or the input is no map that holds a window.

    Example:
        >>> round(GGeMPool2d(2, p=2.0)(torch.tensor([[[[1.0, 1.0], [1.0, 5.0]]]])).item(), 4)
        2.6458
        >>> GGeMPool2d(3, stride=2, groups=4)(torch.rand(2, 8, 9, 9)).shape
        torch.Size([2, 8, 4, 4])

    Source: Ko et al., "Group Generalized Mean Pooling for Vision Transformer", 2022. Windows are ours.
    """

    keeps_constants = False

    def __init__(
        self,
        kernel_size: Size = 2,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        groups: int = 1,
        p: float = 3.0,
        learnable: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)
        if groups < 1 or eps <= 0:
            raise InputError(f"groups, eps: expected positive numbers, got {groups} and {eps}")
        self.groups = groups
        self.eps = eps
        self.p = nn.Parameter(torch.full((groups,), float(p)), requires_grad=learnable)

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        require_divides("groups", self.groups, x.shape[1])
        p = self.p.to(accumulation_dtype(x.dtype)).repeat_interleave(x.shape[1] // self.groups)
        p = p.view(-1, *(1,) * self.dims)
        logs = x.clamp(min=self.eps).log()
        # powers relative to the cell that counts most, so that none overflows
        with torch.no_grad():
            top = torch.where(p < 0, -self.windows.max(-logs), self.windows.max(logs))
        cells, inside = self.windows.views(logs), self.windows.inside(x.shape[2:], x.device)
        masks = [None] * len(cells) if inside is None else inside
        powers = count = torch.zeros_like(top)
        for cell, mask in zip(cells, masks, strict=True):
            power = (
                (p * (cell - top)).exp() if mask is None else (p * (cell - top)).masked_fill(~mask, -torch.inf).exp()
            )
            powers = powers + power
            count = count + (1 if mask is None else mask)
        near_zero = p.abs() < SERIES_BELOW[p.dtype]
        safe_p = torch.where(near_zero, torch.ones_like(p), p)
        mean = self.windows.mean(logs)
        series = mean + p / 2 * (self.windows.mean(logs.detach().square()) - mean.detach().square())
        return torch.where(near_zero, series, top + (powers / count).log() / safe_p).exp()


class GGeMPool1d(GGeMPool):
    dims = 1


class GGeMPool2d(GGeMPool):
    dims = 2


class GGeMPool3d(GGeMPool):
    dims = 3
