from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.requirements import require_one_of, require_positive
from cenote.pool.spatial.weighted import Cell, Grad, LeanWindowPool, Owned
from cenote.pool.spatial.windows import Size

Similarity = Literal["channel", "vector"]


class EDSCWPool(LeanWindowPool):
    """Each activation of a window weighted by the exponential of its Dice-Sørensen similarity to the window's mean.

    `DSC_i = 2 |a_i m| / (a_i^2 + m^2)` with `m = mean_i a_i`, `y = sum_i exp(DSC_i) a_i / sum_i exp(DSC_i)`: a mean that counts
    outliers less. `DSC` lies in [0, 1], so no two weights of a window differ by more than a factor `e`.

    Use `EDSCWPool1d`, `EDSCWPool2d` or `EDSCWPool3d`: maps of one to three dimensions, with or without a batch.

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
        The similarity is one of magnitudes: `-a_i` is as similar to the mean as `a_i`.
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
        require_one_of(("channel", "vector"), similarity=similarity)
        self.similarity = similarity
        self.channels_apart = similarity == "channel"

    def score(self, a: Cell, context: Cell) -> Owned:
        if self.similarity == "channel":
            ratio, _ = _ratio(a, context)
            return 2 * ratio / (1 + ratio.square())
        a, mean, _ = _scaled(a, context)
        both = (a.square() + mean.square()).sum(1, keepdim=True)
        return torch.where(both > 0, 2 * (a * mean).abs().sum(1, keepdim=True) / _nonzero(both), 1)

    def score_gradient(self, g: Owned, a: Cell, context: Cell) -> tuple[Tensor, Tensor]:
        if self.similarity == "channel":
            ratio, larger = _ratio(a, context)
            g = g * 2 * (1 - ratio.square()) / (1 + ratio.square()).square() / larger
            # the ratio rises with the smaller of the two and falls with the larger
            smaller_is_a = a.abs() <= context.abs()
            at_a, at_mean = torch.where(smaller_is_a, g, -g * ratio), torch.where(smaller_is_a, -g * ratio, g)
            return at_a * a.sign(), at_mean * context.sign()
        a, mean, scale = _scaled(a, context)
        both = _nonzero((a.square() + mean.square()).sum(1, keepdim=True))
        dice = 2 * (a * mean).abs().sum(1, keepdim=True) / both
        g = 2 * g / both / scale
        return g * (a.sign() * mean.abs() - dice * a), g * (mean.sign() * a.abs() - dice * mean)


class IDWPool(LeanWindowPool):
    """Each activation of a window weighted by its inverse distance to the window's mean: `w_i ~ 1 / |a_i - m|`.

    Use `IDWPool1d`, `IDWPool2d` or `IDWPool3d`: maps of one to three dimensions, with or without a batch.

    Args:
        kernel_size, stride, padding, ceil_mode, grad: as in `EDSCWPool`.
        eps: smallest distance, as a share of the magnitudes of `a_i` and `m`.

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
        require_positive(eps=eps)
        self.eps = eps

    def score(self, a: Cell, context: Cell) -> Owned:
        return -torch.maximum((a - context).abs(), self._nearest(a, context)).log()

    def score_gradient(self, g: Owned, a: Cell, context: Cell) -> tuple[Tensor, Tensor]:
        distance = a - context
        far = distance.abs() > self._nearest(a, context)
        at_a = torch.where(far, -g / torch.where(far, distance, 1), 0)
        return at_a, -at_a

    def _nearest(self, a: Cell, context: Cell) -> Cell:
        return self.eps * torch.maximum(a.detach().abs(), context.detach().abs()) + torch.finfo(a.dtype).tiny


def _ratio(a: Cell, b: Cell) -> tuple[Cell, Cell]:
    """The smaller by the larger magnitude (1 where both are 0), and the larger; no square over- or underflows."""
    tiny = torch.finfo(a.dtype).tiny
    a, b = a.abs().clamp(min=tiny), b.abs().clamp(min=tiny)
    larger = torch.maximum(a, b)
    return torch.minimum(a, b) / larger, larger


def _scaled(a: Cell, b: Cell) -> tuple[Cell, Cell, Owned]:
    """Both by the largest magnitude among their channels, and that: their similarity is the same."""
    scale = _nonzero(torch.maximum(a.detach().abs(), b.detach().abs()).amax(1, keepdim=True))
    return a / scale, b / scale, scale


def _nonzero(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return torch.where(x > 0, x, 1)


class EDSCWPool1d(EDSCWPool):
    dims = 1


class EDSCWPool2d(EDSCWPool):
    dims = 2


class EDSCWPool3d(EDSCWPool):
    dims = 3


class IDWPool1d(IDWPool):
    dims = 1


class IDWPool2d(IDWPool):
    dims = 2


class IDWPool3d(IDWPool):
    dims = 3
