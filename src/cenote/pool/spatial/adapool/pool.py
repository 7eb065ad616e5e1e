from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.pool.base import Pooled
from cenote.pool.spatial.adapool.edscw import EDSCWPool1d, EDSCWPool2d, EDSCWPool3d, Similarity
from cenote.pool.spatial.base import WindowPool
from cenote.pool.spatial.softpool import SoftPool1d, SoftPool2d, SoftPool3d
from cenote.pool.spatial.unit import Constraint, in_unit_interval, unit_parameter
from cenote.pool.spatial.weighted import Grad
from cenote.pool.spatial.windows import Size, Windows

_EDSCW: dict[int, Any] = {1: EDSCWPool1d, 2: EDSCWPool2d, 3: EDSCWPool3d}
_EM: dict[int, Any] = {1: SoftPool1d, 2: SoftPool2d, 3: SoftPool3d}


class AdaPool(WindowPool):
    """A learned mixture of two soft poolings: a robust mean (eDSCW) and the exponential maximum (eM, which is SoftPool).

    `y = beta * eDSCW(a) + (1 - beta) * eM(a)`; the fixed poolings are `EDSCWPool2d` and `SoftPool2d`.

    Use `AdaPool1d`, `AdaPool2d` or `AdaPool3d`: maps of one to three dimensions, with or without a batch.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; cells outside of the map are left out.
        beta: a number: one for all windows, of maps of any size. A tuple, the output's size: one for each window, drawn from
            the standard normal distribution and clamped to [0, 1], as the authors do. A tensor of the output's size, or of
            ones: its values. Channels and batch share it.
        learnable: whether `beta` is trained.
        constraint: how `beta` is kept in [0, 1]: `"clamp"` or `"sigmoid"`.
        grad: `"full"`, or `"weights"`: the weights within a window are held constant, as in the authors' kernel.
        similarity: see `EDSCWPool2d`.

    Example:
        >>> AdaPool2d(2, beta=(4, 4))(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 4, 4])
        >>> output, weights = AdaPool2d(2).attend(torch.randn(2, 3, 8, 8))
        >>> weights.shape
        torch.Size([2, 3, 4, 4, 2, 2])
        >>> AdaUnpool2d(2)(output, weights).shape
        torch.Size([2, 3, 8, 8])

    Source: Stergiou, Poppe, "AdaPool: Exponential Adaptive Pooling for Information-Retaining Downsampling", IEEE TIP 2023.

    Note:
        The authors clamp `beta` when it is made and leave it free in training; here it stays in [0, 1]. Their masks for
        unpooling have no batch or channel axis, so that the last to write wins; here each channel keeps its own. Their
        single-kernel path (`native=True`) reads outside of `beta` and is not followed. Padding and ceil mode are ours.
    """

    def __init__(
        self,
        kernel_size: Size = 2,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        beta: float | tuple[int, ...] | Tensor = 0.5,
        learnable: bool = True,
        constraint: Constraint = "clamp",
        grad: Grad = "full",
        similarity: Similarity = "channel",
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)
        self.constraint: Constraint = constraint
        self.beta = unit_parameter(self._first_beta(beta), constraint, learnable)
        self.edscw = _EDSCW[self.dims](kernel_size, stride, padding, ceil_mode, grad=grad, similarity=similarity)
        self.em = _EM[self.dims](kernel_size, stride, padding, ceil_mode, grad=grad)

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        return _mixed(self._beta(x), self.edscw.pool(x), self.em.pool(x))

    def attend(self, x: Float[Tensor, "*given"]) -> Pooled:
        """As calling the pool, and also the weights `[batch, channels, *windows, *kernel]` (without a batch as `x`)."""
        batch = self.as_batch(x)
        robust, peak = self.edscw.attend(batch), self.em.attend(batch)
        beta = self._beta(batch)
        output = _mixed(beta, robust.output, peak.output)
        weights = _mixed(beta.reshape(beta.shape + (1,) * self.dims), robust.weights, peak.weights)
        return Pooled(self.as_given(output, x), self.as_given(weights, x))

    def _first_beta(self, beta: float | tuple[int, ...] | Tensor) -> Float[Tensor, "*pooled"]:
        if isinstance(beta, Tensor) and beta.dim() == self.dims:
            return beta
        if isinstance(beta, tuple) and len(beta) == self.dims:
            return torch.randn(beta)
        if isinstance(beta, float | int) and 0 <= beta <= 1:
            return torch.full((1,) * self.dims, float(beta))
        raise InputError(
            f"beta: expected a number in [0, 1], the output's size in {self.dims} dimension(s), or a tensor of that size, "
            f"got {f'one of shape {tuple(beta.shape)}' if isinstance(beta, Tensor) else beta}"
        )

    def _beta(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "*pooled"]:
        out, have = self.windows.output_size(x.shape[2:]), tuple(self.beta.shape)
        if any(n != m and n != 1 for n, m in zip(have, out, strict=True)):
            raise InputError(
                f"x: a map of size {tuple(x.shape[2:])} has {out} windows, but beta was made for {have}; "
                f"give a map of the same size, or build the pool with beta={out}"
            )
        return in_unit_interval(self.beta, self.constraint).to(x.dtype)


class AdaUnpool(nn.Module):
    """Spread pooled values back over their windows with the weights that pooled them.

    `a_i = w_i y` in the window of `y`; where windows overlap, their shares add up. A window then sums to its pooled value;
    with `preserve="mean"` each share is multiplied by the number of cells in the window, so that their mean is that value.

    Use `AdaUnpool1d`, `AdaUnpool2d` or `AdaUnpool3d`: maps of one to three dimensions, with or without a batch.

    Args:
        kernel_size, stride, padding, ceil_mode: those of the pool.
        preserve: `"sum"`, as the authors, or `"mean"`.

    Example:
        >>> y, weights = SoftPool2d(2).attend(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]))
        >>> round(AdaUnpool2d(2)(y, weights).sum().item(), 3)
        2.493

    Source: as `AdaPool`, there adaUnPool.
    """

    dims: ClassVar[int]

    def __init__(
        self,
        kernel_size: Size = 2,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        preserve: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        require_one_of(("sum", "mean"), preserve=preserve)
        self.windows = Windows.of(self.dims, kernel_size, stride, padding, ceil_mode)
        self.preserve = preserve

    def forward(
        self,
        y: Float[Tensor, "*pooled"],
        weights: Float[Tensor, "*windows_and_kernel"],
        output_size: Sequence[int] | None = None,
    ) -> Float[Tensor, "*given"]:
        """The map that `y` was pooled from, as far as `weights` tell.

        Args:
            y: pooled values, `[batch, channels, *windows]` or `[channels, *windows]`.
            weights: from a pool's `attend`; with one channel they count for all.
            output_size: size of the map; by default the smallest that has these windows.

        Raises:
            InputError: where `y`, `weights` and `output_size` do not fit together.
        """
        w = self.windows
        if y.dim() not in (w.dims + 1, w.dims + 2):
            raise InputError(f"y: expected {w.dims + 1} or {w.dims + 2} dimensions, got shape {tuple(y.shape)}")
        out = y.shape[-w.dims :]
        if weights.dim() != y.dim() + w.dims or weights.shape[y.dim() - w.dims :] != out + w.kernel:
            raise InputError(
                f"weights: expected [..., {', '.join(map(str, out + w.kernel))}] for y of shape {tuple(y.shape)}, "
                f"got {tuple(weights.shape)}; give the weights of the pool's attend"
            )
        smallest = [(n - 1) * s + k - 2 * p for n, s, k, p in zip(out, w.stride, w.kernel, w.padding, strict=True)]
        size = tuple(smallest if output_size is None else output_size)[-w.dims :]
        if w.output_size(size) != tuple(out):
            raise InputError(f"output_size: a map of size {size} has {w.output_size(size)} windows, y has {tuple(out)}")
        shares = [y * share for share in weights.flatten(-w.dims).unbind(-1)]
        if self.preserve == "mean":
            inside = w.inside(size, y.device)
            cells = w.cells if inside is None else torch.stack(inside).sum(0).to(y.dtype)
            shares = [share * cells for share in shares]
        return w.spread(shares, size)


def _mixed(beta: Tensor, robust: Tensor, peak: Tensor) -> Tensor:
    return peak + beta * (robust - peak)


class AdaPool1d(AdaPool):
    dims = 1


class AdaPool2d(AdaPool):
    dims = 2


class AdaPool3d(AdaPool):
    dims = 3


class AdaUnpool1d(AdaUnpool):
    dims = 1


class AdaUnpool2d(AdaUnpool):
    dims = 2


class AdaUnpool3d(AdaUnpool):
    dims = 3
