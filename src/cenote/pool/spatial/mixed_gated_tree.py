from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.pool.spatial.axes import integers_per_axis
from cenote.pool.spatial.base import WindowPool
from cenote.pool.spatial.unit import Constraint, in_unit_interval, unit_parameter
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
        places = None if regions is None else integers_per_axis("regions", regions, self.dims)
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


class MixedPool(SharedWindowPool):
    """A learned blend of maximum and mean.

    `y = a max_i x_i + (1 - a) mean_i x_i`, with one learned `a` in [0, 1].

    Use `MixedPool1d`, `MixedPool2d` or `MixedPool3d`: maps of one to three dimensions, with or without a batch.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; cells outside of the map are left out.
        channels: number of channels of the map, for parameters of each channel's own; else channels share them.
        regions: number of windows along each dimension, for parameters of each window's own; else windows share them.
        count_include_pad: whether the mean counts padded cells, as in `torch.nn.AvgPool2d`.
        a: its first value.
        constraint: how it is kept in [0, 1]: `"sigmoid"` or `"clamp"`.

    Example:
        >>> MixedPool2d(2, a=0.5)(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])).item()
        2.25

    Source: Lee, Gallagher, Tu, "Generalizing Pooling Functions in Convolutional Neural Networks: Mixed, Gated, and Tree",
    AISTATS 2016.

    Note:
        The paper asks for `a` in [0, 1] without saying how, nor where it starts; a sigmoid and 0.5 are taken here.
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
        a: float = 0.5,
        constraint: Constraint = "sigmoid",
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, channels, regions, count_include_pad)
        if not 0 <= a <= 1:
            raise InputError(f"a: expected a number in [0, 1], got {a}")
        self.constraint: Constraint = constraint
        self.a = unit_parameter(torch.full(self.owners, float(a)), constraint)

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        mean = self._mean(x)
        return mean + in_unit_interval(self.a, self.constraint).to(x.dtype) * (self.windows.max(x) - mean)


class GatedPool(SharedWindowPool):
    """A blend of maximum and mean that a gate chooses for each window.

    `g = sigmoid(w . x)`, `y = g max_i x_i + (1 - g) mean_i x_i`, with one learned weight per cell of the kernel, no bias.

    Use `GatedPool1d`, `GatedPool2d` or `GatedPool3d`: maps of one to three dimensions, with or without a batch.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; cells outside of the map are left out.
        channels, regions, count_include_pad: as in `MixedPool`.

    Example:
        >>> GatedPool2d(3, stride=2, ceil_mode=True)(torch.randn(2, 8, 8, 7)).shape
        torch.Size([2, 8, 4, 3])

    Source: as `MixedPool`. The authors' best net has `TreePool` where it pools first and `GatedPool` later.
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
        super().__init__(kernel_size, stride, padding, ceil_mode, channels, regions, count_include_pad)
        self.gate = self._first_filters(1)

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        mean = self._mean(x)
        return mean + self._gates(x) * (self.windows.max(x) - mean)

    def gates(self, x: Float[Tensor, "*given"]) -> Float[Tensor, "*pooled"]:
        """How much of the maximum each window takes."""
        return self.as_given(self._gates(self.as_batch(x)), x)

    def _gates(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        return torch.sigmoid(self.windows.filtered(x, self.gate.to(x.dtype))[0])


class TreePool(SharedWindowPool):
    """A soft binary tree over each window: its leaves are learned filters, its inner nodes gates.

    `y_m = v_m . x` at a leaf; `y_m = s_m y_left + (1 - s_m) y_right` with `s_m = sigmoid(w_m . x)` at an inner node. The
    filters are free: a tree can change scale and sign.

    Use `TreePool1d`, `TreePool2d` or `TreePool3d`: maps of one to three dimensions, with or without a batch.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; cells outside of the map are left out.
        levels: `L` of the tree, with `2^(L-1)` leaves.
        channels, regions: as in `MixedPool`.
        leaves: what filters start from: `"random"`, near zero as the authors do, or `"mean"`, near the mean of the window.

    Attributes:
        gates: `[2^(L-1) - 1, channels or 1, *regions or ones, *kernel]`, the root first, then level by level.
        leaves: `[2^(L-1), ...]`, from left to right.

    Example:
        >>> TreePool2d(3, stride=2, levels=3)(torch.randn(2, 8, 9, 9)).shape
        torch.Size([2, 8, 4, 4])

    Source: as `MixedPool`.
    """

    keeps_constants = False

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        levels: int = 2,
        channels: int | None = None,
        regions: Size | None = None,
        leaves: Literal["random", "mean"] = "random",
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, channels, regions)
        require_at_least(1, levels=levels)
        require_one_of(("random", "mean"), leaves=leaves)
        self.levels = levels
        self.leaves = self._first_filters(2 ** (levels - 1))
        if leaves == "mean":
            with torch.no_grad():
                self.leaves.div_(self.windows.cells).add_(1 / self.windows.cells)
        self.gates = self._first_filters(2 ** (levels - 1) - 1) if levels > 1 else None

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        filters = self.leaves if self.gates is None else torch.cat([self.gates, self.leaves])
        answers = self.windows.filtered(x, filters.to(x.dtype))
        count = len(answers) // 2
        gates, nodes = answers[:count], answers[count:]
        while len(nodes) > 1:
            gates, level = gates[: -len(nodes) // 2], gates[-len(nodes) // 2 :]
            pairs = zip(level, nodes[::2], nodes[1::2], strict=True)
            nodes = [right + torch.sigmoid(s) * (left - right) for s, left, right in pairs]
        return nodes[0]

    def shares(self, x: Float[Tensor, "*given"]) -> Float[Tensor, "leaves *pooled"]:
        """How much of each leaf every window takes, from left to right; they sum to 1."""
        batch = self.as_batch(x)
        if self.gates is None:
            return torch.ones_like(self.as_given(self.pool(batch), x)).unsqueeze(0)
        shares = [torch.ones((), dtype=x.dtype, device=x.device)]
        for s in self.windows.filtered(batch, self.gates.to(x.dtype)):
            # gates come level by level: the oldest share is that of the node which this gate parts
            whole, s = shares.pop(0), torch.sigmoid(s)
            shares += [whole * s, whole * (1 - s)]
        return torch.stack([self.as_given(share, x) for share in shares])


class MixedPool1d(MixedPool):
    dims = 1


class MixedPool2d(MixedPool):
    dims = 2


class MixedPool3d(MixedPool):
    dims = 3


class GatedPool1d(GatedPool):
    dims = 1


class GatedPool2d(GatedPool):
    dims = 2


class GatedPool3d(GatedPool):
    dims = 3


class TreePool1d(TreePool):
    dims = 1


class TreePool2d(TreePool):
    dims = 2


class TreePool3d(TreePool):
    dims = 3
