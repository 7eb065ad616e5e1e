from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.pool.spatial.base import WindowPool
from cenote.pool.spatial.windows import Shape, Size

FIRST_STD = 0.1


class SharedWindowPool(WindowPool):
    """Base of the pools of the paper, and who shares a set of their parameters.

    By default one set serves the whole layer. With `channels` each channel has its own, with `regions` (the output's size)
    each window, with both each window of each channel. One set for a whole net: use the same module at every place.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; cells outside of the map are left out.
        channels: number of channels of the map, for one set per channel.
        regions: number of windows along each dimension, for one set per window.
        count_include_pad: whether the mean counts padded cells, as in `torch.nn.AvgPool2d`.
    """

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        channels: int | None = None,
        regions: Size | None = None,
        count_include_pad: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)
        if channels is not None and channels < 1:
            raise InputError(f"channels: expected a positive number or None, got {channels}")
        places = (regions,) * self.dims if isinstance(regions, int) else regions
        if places is not None and (len(places) != self.dims or min(places) < 1):
            raise InputError(f"regions: expected the output's size in {self.dims} dimension(s), got {regions}")
        self.channels = channels
        self.regions = places
        self.count_include_pad = count_include_pad
        self.keeps_constants = type(self).keeps_constants and not (count_include_pad and any(self.padding))

    @property
    def owners(self) -> Shape:
        """`[channels or 1, *regions or ones]`: how many sets of parameters there are."""
        return (self.channels or 1, *(self.regions or (1,) * self.dims))

    def as_batch(self, x: Float[Tensor, "*given"]) -> Float[Tensor, "batch channels *map"]:
        batch = super().as_batch(x)
        if self.channels not in (None, batch.shape[1]):
            raise InputError(f"x: expected {self.channels} channels, got {batch.shape[1]}")
        out = self.windows.output_size(batch.shape[2:])
        if self.regions not in (None, out):
            raise InputError(f"x: expected a map with {self.regions} windows, got {out}; give a map of the same size")
        return batch

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channels={self.channels}, regions={self.regions}"

    def _mean(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        return self.windows.mean(x, self.count_include_pad)

    def _first_filters(self, count: int) -> nn.Parameter:
        return nn.Parameter(FIRST_STD * torch.randn(count, *self.owners, *self.kernel_size))
