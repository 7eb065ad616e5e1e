"""What the window pools share: the manners of `torch.nn.AvgPool2d`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_floating
from cenote.core.segments import accumulation_dtype
from cenote.pool.spatial.windows import Size, Windows


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
    keeps_constants: bool = True

    def __init__(
        self, kernel_size: Size, stride: Size | None = None, padding: Size = 0, ceil_mode: bool = False
    ) -> None:
        super().__init__()
        self.windows = Windows.of(self.dims, kernel_size, stride, padding, ceil_mode)
        self.kernel_size = self.windows.kernel
        self.stride = self.windows.stride
        self.padding = self.windows.padding
        self.ceil_mode = ceil_mode

    def forward(self, x: Float[Tensor, "*given"]) -> Float[Tensor, "*pooled"]:
        """Pool `x`, `[batch, channels, *map]` or `[channels, *map]`."""
        return self.as_given(self.pool(self.as_batch(x)), x)

    @abstractmethod
    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Float[Tensor, "batch channels *windows"]:
        """Pool a batch in a precision to sum in."""

    def as_batch(self, x: Float[Tensor, "*given"]) -> Float[Tensor, "batch channels *map"]:
        """Check a map, give it a batch and a precision to sum in.

        Raises:
            InputError: naming what came and what was expected.
        """
        axes = "length" if self.dims == 1 else ", ".join(("depth", "height", "width")[-self.dims :])
        if not isinstance(x, Tensor) or x.dim() not in (self.dims + 1, self.dims + 2):
            came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"x: expected a tensor [batch, channels, {axes}] or [channels, {axes}], got {came}")
        require_floating(x)
        self.windows.output_size(x.shape[-self.dims :])
        return (x if x.dim() == self.dims + 2 else x.unsqueeze(0)).to(accumulation_dtype(x.dtype))

    def as_given(self, y: Float[Tensor, "batch *any"], x: Float[Tensor, "*given"]) -> Float[Tensor, "*as_given"]:
        """The way back of `as_batch`: what was made of a batch in the precision of `x`, and without a batch as `x`."""
        y = y.to(x.dtype)
        return y if x.dim() == self.dims + 2 else y.squeeze(0)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, ceil_mode={self.ceil_mode}"
        )
