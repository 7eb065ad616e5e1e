"""Windows that slide over a map, in one, two or three dimensions, as `torch.nn.AvgPool2d` places them.

Nothing is unfolded: the cell `i` of every window together form one strided view of the map, so a window operation is a loop
over the few cells of the kernel, and each step touches a tensor of the output's size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.pool.spatial.axes import integers_per_axis

Size = int | tuple[int, ...]
Shape = tuple[int, ...]

_MAX: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Windows:
    """Where windows stand; all four as in `torch.nn.AvgPool2d`, one number per dimension.

    Example:
        >>> Windows.of(2, kernel_size=3, stride=2).output_size((8, 7))
        (3, 3)
        >>> Windows.of(2, kernel_size=3, stride=2, ceil_mode=True).output_size((8, 7))
        (4, 3)
    """

    kernel: Shape
    stride: Shape
    padding: Shape
    ceil_mode: bool = False

    @classmethod
    def of(
        cls, dims: int, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False
    ) -> Windows:
        """From a pool's arguments.

        Raises:
            InputError: where a size is not positive, has another number of dimensions, or pads more than half a window.
        """
        kernel = integers_per_axis("kernel_size", kernel_size, dims)
        steps = kernel if stride is None else integers_per_axis("stride", stride, dims)
        pads = integers_per_axis("padding", padding, dims, least=0)
        if any(2 * p > k for p, k in zip(pads, kernel, strict=True)):
            raise InputError(f"padding: expected at most half of kernel_size {kernel}, got {pads}")
        return cls(kernel, steps, pads, ceil_mode)

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel)

    @property
    def cells(self) -> int:
        """Number of cells in a window."""
        return math.prod(self.kernel)

    def output_size(self, size: Sequence[int]) -> Shape:
        """Number of windows along each dimension of a map of this size.

        Raises:
            InputError: where not even one window fits.
        """
        out = []
        for length, k, s, p in zip(size, self.kernel, self.stride, self.padding, strict=True):
            count = (length + 2 * p - k + (s - 1 if self.ceil_mode else 0)) // s + 1
            # the last window must begin inside the map or its left padding
            if self.ceil_mode and (count - 1) * s >= length + p:
                count -= 1
            if count < 1 or length < 1:
                raise InputError(
                    f"x: a map of size {tuple(size)} is smaller than one window {self.kernel} with padding {self.padding}; "
                    f"take a smaller kernel_size"
                )
            out.append(count)
        return tuple(out)

    def views(self, x: Float[Tensor, "*lead_and_map"]) -> list[Float[Tensor, "*lead_and_windows"]]:
        """One tensor of the output's size per cell of the kernel, row by row; cells outside of the map are 0."""
        size = x.shape[-self.dims :]
        out = self.output_size(size)
        padded = self._padded(x, out)
        return [padded[cell] for cell in self._slices(out)]

    def inside(self, size: Sequence[int], device: torch.device) -> list[Bool[Tensor, "*windows"]] | None:
        """For each cell of the kernel, in which windows it lies inside of the map; `None` where all always do."""
        out = self.output_size(size)
        if not any(any(pads) for pads in self._pads(size, out)):
            return None
        axes = []
        for length, count, k, s, p in zip(size, out, self.kernel, self.stride, self.padding, strict=True):
            at = torch.arange(count, device=device) * s - p + torch.arange(k, device=device).unsqueeze(1)
            axes.append((at >= 0) & (at < length))
        masks = []
        for cell in itertools.product(*(range(k) for k in self.kernel)):
            mask = torch.ones((), dtype=torch.bool, device=device)
            for axis, i in zip(axes, cell, strict=True):
                mask = mask.unsqueeze(-1) & axis[i]
            masks.append(mask)
        return masks

    def max(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        """Largest value of each window; of equal ones the first gets the gradient."""
        return _MAX[self.dims](x, self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode)

    def mean(
        self, x: Float[Tensor, "batch channels *map"], count_include_pad: bool = False
    ) -> Float[Tensor, "batch channels *windows"]:
        """Mean of each window, over its cells inside of the map unless `count_include_pad`."""
        return _MEAN[self.dims](x, self.kernel, self.stride, self.padding, self.ceil_mode, count_include_pad)

    def filtered(
        self, x: Float[Tensor, "batch channels *map"], filters: Float[Tensor, "filters owners *windows_and_kernel"]
    ) -> list[Float[Tensor, "batch channels *windows"]]:
        """`v . a` of each filter `v` and window `a`; cells outside of the map are left out.

        Args:
            x: the map.
            filters: `[filters, channels or 1, *windows or ones, *kernel]`: shared by all channels and windows, or not.
        """
        channels, size = x.shape[1], x.shape[2:]
        out = self.output_size(size)
        count, places = filters.shape[0], filters.shape[2 : 2 + self.dims]
        if max(places) == 1:
            weight = filters.reshape(count, filters.shape[1], 1, *self.kernel).expand(-1, channels, -1, *self.kernel)
            # one convolution per channel with all of its filters: the map is read once
            weight = weight.transpose(0, 1).flatten(0, 1)
            y = _CONV[self.dims](self._padded(x, out), weight, stride=self.stride, groups=channels)
            return list(y.unflatten(1, (channels, count)).unbind(2))
        views = self.views(x)
        by_cell = filters.flatten(-self.dims).unbind(-1)
        return [sum_of_products([w[f] for w in by_cell], views) for f in range(count)]

    def spread(
        self, cells: Iterable[Float[Tensor, "*lead_and_windows"]], size: Sequence[int]
    ) -> Float[Tensor, "*lead_and_map"]:
        """The way back of `views`: every cell of the map gets the sum of what the windows that hold it have there."""
        out = self.output_size(size)
        pads = self._pads(size, out)
        padded = [left + length + right for length, (left, right) in zip(size, pads, strict=True)]
        apart = all(s >= k for k, s in zip(self.kernel, self.stride, strict=True))
        covered = apart and all(n * k == length for n, k, length in zip(out, self.kernel, padded, strict=True))
        total: Tensor | None = None
        for cell, values in zip(self._slices(out), cells, strict=True):
            if total is None:
                shape = (*values.shape[: -self.dims], *padded)
                total = values.new_empty(shape) if covered else values.new_zeros(shape)
            if apart:
                total[cell] = values
            else:
                total[cell] += values
        assert total is not None
        for axis, (length, (left, _)) in enumerate(zip(size, pads, strict=True), start=-self.dims):
            total = total.narrow(axis, left, length)
        return total

    def _slices(self, out: Shape) -> list[tuple[Any, ...]]:
        corners = itertools.product(*(range(k) for k in self.kernel))
        return [
            (..., *(slice(i, i + (n - 1) * s + 1, s) for i, n, s in zip(corner, out, self.stride, strict=True)))
            for corner in corners
        ]

    def _pads(self, size: Sequence[int], out: Shape) -> list[tuple[int, int]]:
        """Cells before and after the map that its windows reach."""
        axes = zip(size, out, self.kernel, self.stride, self.padding, strict=True)
        return [(p, max(0, (n - 1) * s + k - p - length)) for length, n, k, s, p in axes]

    def _padded(self, x: Float[Tensor, "*lead_and_map"], out: Shape) -> Float[Tensor, "*lead_and_padded_map"]:
        pads = self._pads(x.shape[-self.dims :], out)
        return F.pad(x, [n for pair in reversed(pads) for n in pair]) if any(any(p) for p in pads) else x


def sum_of_products(weights: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """`sum_i w_i v_i` of two equally long lists."""
    total = weights[0] * values[0]
    for w, v in zip(weights[1:], values[1:], strict=True):
        total = torch.addcmul(total, w, v)
    return total
