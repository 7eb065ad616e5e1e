"""What the window pools share: the manners of `torch.nn.AvgPool2d`."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.segments import accumulation_dtype
from cenote.pool.base import Pooled
from cenote.pool.spatial.windows import Size, Windows, sum_of_products

Grad = Literal["full", "weights"]


class WindowPool(nn.Module, ABC):
    """Base of the pools that map `[batch, channels, *map]` to `[batch, channels, *windows]`, also without a batch.

    Half precision is computed in float32.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.AvgPool2d`; `stride=None` means `kernel_size`.

    Attributes:
        dims: number of spatial dimensions.
        keeps_constants: whether a constant map gives the same constant.
    """

    dims: ClassVar[int]
    keeps_constants: ClassVar[bool] = True

    def __init__(
        self, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False
    ) -> None:
        super().__init__()
        self.windows = Windows.of(self.dims, kernel_size, stride, padding, ceil_mode)
        self.kernel_size = self.windows.kernel
        self.stride = self.windows.stride
        self.padding = self.windows.padding
        self.ceil_mode = ceil_mode

    def forward(self, x: Float[Tensor, "*map"]) -> Float[Tensor, "*windows"]:
        """Pool `x`, `[batch, channels, *map]` or `[channels, *map]`."""
        y = self.pool(self.as_batch(x)).to(x.dtype)
        return y if x.dim() == self.dims + 2 else y.squeeze(0)

    @abstractmethod
    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        """Pool a batch in a precision to sum in."""

    def as_batch(self, x: Float[Tensor, "*map"]) -> Float[Tensor, "batch channels *map"]:
        """Check a map, give it a batch and a precision to sum in.

        Raises:
            InputError: naming what came and what was expected.
        """
        axes = "length" if self.dims == 1 else ", ".join(("depth", "height", "width")[-self.dims :])
        if not isinstance(x, Tensor) or x.dim() not in (self.dims + 1, self.dims + 2):
            came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"x: expected a tensor [batch, channels, {axes}] or [channels, {axes}], got {came}")
        if not x.is_floating_point():
            raise InputError(f"x: expected floating point features, got {x.dtype}; use x.float()")
        self.windows.output_size(x.shape[-self.dims :])
        return (x if x.dim() == self.dims + 2 else x.unsqueeze(0)).to(accumulation_dtype(x.dtype))

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, ceil_mode={self.ceil_mode}"
        )


class WeightedWindowPool(WindowPool):
    """Base of the pools `y = sum_i w_i a_i` with `w = softmax_i(s_i)` over the cells `i` of each window.

    Cells outside of the map have weight 0.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `WindowPool`.
        grad: `"full"`: the true derivative; `"weights"`: with the weights held constant, `dy/da_i = w_i`.
    """

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        grad: Grad = "full",
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)
        if grad not in ("full", "weights"):
            raise InputError(f"grad: expected 'full' or 'weights', got {grad!r}")
        self.grad = grad

    @abstractmethod
    def scores(self, x: Float[Tensor, "batch channels *map"]) -> Sequence[Float[Tensor, "batch owners *windows"]]:
        """The score of each cell of the kernel in every window; `owners` is `channels`, or 1 where all share them."""

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        return self._weighted_sum(x, self._unnormalised(x))

    def attend(self, x: Float[Tensor, "*map"]) -> Pooled:
        """As calling the pool, and also the weights `[batch, channels, *windows, *kernel]` (without a batch as `x`).

        They sum to 1 over each window; `AdaUnpool2d` spreads pooled values back with them.
        """
        batch = self.as_batch(x)
        shares = self._unnormalised(batch)
        y = self._weighted_sum(batch, shares)
        weights = torch.stack(shares, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).unflatten(-1, self.kernel_size).to(x.dtype)
        weights = weights.expand(-1, batch.shape[1], *[-1] * (2 * self.dims))
        if x.dim() == self.dims + 1:
            return Pooled(y.squeeze(0).to(x.dtype), weights.squeeze(0))
        return Pooled(y.to(x.dtype), weights)

    def _unnormalised(self, x: Float[Tensor, "batch channels *map"]) -> list[Float[Tensor, "batch owners *windows"]]:
        scores = list(self.scores(x))
        inside = self.windows.inside(x.shape[2:], x.device)
        if inside is not None:
            scores = [s.masked_fill(~there, float("-inf")) for s, there in zip(scores, inside, strict=True)]
        top = functools.reduce(torch.maximum, (s.detach() for s in scores))
        shares = [(s - top).exp() for s in scores]
        return [e.detach() for e in shares] if self.grad == "weights" else shares

    def _weighted_sum(
        self, x: Float[Tensor, "batch channels *map"], shares: Sequence[Float[Tensor, "batch owners *windows"]]
    ) -> Float[Tensor, "batch channels *windows"]:
        # seen from a number near the result, large values neither overflow nor cancel, and their gradients stay exact
        centre = self.centre(x.detach())
        total = functools.reduce(torch.add, shares)
        return centre + sum_of_products(shares, [a - centre for a in self.windows.views(x)]) / total

    def centre(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        """A number between the smallest and the largest value of each window."""
        return self.windows.mean(x)
