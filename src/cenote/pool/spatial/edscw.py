from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.pool.spatial.base import Grad, WeightedWindowPool
from cenote.pool.spatial.windows import Size

Similarity = Literal["channel", "vector"]


class EDSCWPool(WeightedWindowPool):
    """Each activation of a window weighted by the exponential of its Dice-Sørensen similarity to the window's mean.

    `DSC_i = 2 |a_i m| / (a_i^2 + m^2)` with `m = mean_i a_i`, `y = sum_i exp(DSC_i) a_i / sum_i exp(DSC_i)`: a mean that counts
    outliers less. `DSC` lies in [0, 1], so no two weights of a window differ by more than a factor `e`.

    Use `EDSCWPool1d`, `EDSCWPool2d` or `EDSCWPool3d`.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; cells outside of the map are left out.
        grad: `"full"`, or `"weights"`: `dy/da_i = w_i`, as the authors' kernel.
        similarity: `"channel"`: each channel on its own, or `"vector"`: between the vectors over the channels,
            `DSC_i = 2 <|a_i|, |m|> / (|a_i|^2 + |m|^2)`, one weight per position.

    Example:
        >>> round(EDSCWPool2d(2)(torch.tensor([[[[2.0, 2.0], [2.0, 6.0]]]])).item(), 3)
        2.911

    Source: Stergiou, Poppe, "AdaPool: Exponential Adaptive Pooling for Information-Retaining Downsampling", 2021.

    Note:
        The paper speaks of vectors, the authors' code treats each channel alone; the code is the default here. Where
        `a_i = m = 0`, `DSC_i = 1`, the limit along `a_i = m`; the authors' code gives NaN there.
    """

    def __init__(
        self,
        kernel_size: Size = 2,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        grad: Grad = "full",
        similarity: Similarity = "channel",
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, grad)
        if similarity not in ("channel", "vector"):
            raise InputError(f"similarity: expected 'channel' or 'vector', got {similarity!r}")
        self.similarity = similarity

    def scores(self, x: Float[Tensor, "batch channels *map"]) -> Sequence[Float[Tensor, "batch owners *windows"]]:
        mean = self.windows.mean(x).abs()
        if self.similarity == "channel":
            return [_dice(a.abs(), mean) for a in self.windows.views(x)]
        # the similarity does not depend on the scale; squares of huge or tiny values would
        scale = _nonzero(self.windows.max(x.detach().abs().amax(1, keepdim=True)))
        mean = mean / scale
        return [_vector_dice(a.abs() / scale, mean) for a in self.windows.views(x)]


class IDWPool(WeightedWindowPool):
    """Each activation of a window weighted by its inverse distance to the window's mean: `w_i ~ 1 / |a_i - m|`.

    Use `IDWPool1d`, `IDWPool2d` or `IDWPool3d`.

    Args:
        kernel_size, stride, padding, ceil_mode, grad: as in `EDSCWPool`.
        eps: smallest distance, as a share of the largest magnitude in the window.

    Example:
        >>> IDWPool2d(2)(torch.full((1, 1, 2, 2), 5.0)).item()
        5.0

    Source: a baseline of Stergiou, Poppe, "AdaPool", 2021.

    Note:
        A constant window gives its constant; the authors' code gives 0 there.
    """

    def __init__(
        self,
        kernel_size: Size = 2,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        grad: Grad = "full",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, grad)
        if eps <= 0:
            raise InputError(f"eps: expected a positive distance, got {eps}")
        self.eps = eps

    def scores(self, x: Float[Tensor, "batch channels *map"]) -> Sequence[Float[Tensor, "batch owners *windows"]]:
        mean = self.windows.mean(x)
        nearest = self.eps * self.windows.max(x.detach().abs()) + torch.finfo(x.dtype).tiny
        return [-torch.maximum((a - mean).abs(), nearest).log() for a in self.windows.views(x)]


def _dice(a: Float[Tensor, "*any"], b: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """`2ab / (a^2 + b^2)` of non-negative numbers, from their ratio: no square over- or underflows."""
    large = torch.maximum(a, b)
    ratio = torch.where(large > 0, torch.minimum(a, b) / _nonzero(large), 1)
    return 2 * ratio / (1 + ratio.square())


def _vector_dice(
    a: Float[Tensor, "batch channels *windows"], b: Float[Tensor, "batch channels *windows"]
) -> Float[Tensor, "batch 1 *windows"]:
    both = (a.square() + b.square()).sum(1, keepdim=True)
    return torch.where(both > 0, 2 * (a * b).sum(1, keepdim=True) / _nonzero(both), 1)


def _nonzero(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return torch.where(x > 0, x, 1)


class EDSCWPool1d(EDSCWPool):
    """`EDSCWPool` of `[batch, channels, length]`."""

    dims = 1


class EDSCWPool2d(EDSCWPool):
    """`EDSCWPool` of `[batch, channels, height, width]`."""

    dims = 2


class EDSCWPool3d(EDSCWPool):
    """`EDSCWPool` of `[batch, channels, depth, height, width]`."""

    dims = 3


class IDWPool1d(IDWPool):
    """`IDWPool` of `[batch, channels, length]`."""

    dims = 1


class IDWPool2d(IDWPool):
    """`IDWPool` of `[batch, channels, height, width]`."""

    dims = 2


class IDWPool3d(IDWPool):
    """`IDWPool` of `[batch, channels, depth, height, width]`."""

    dims = 3
