"""Plain mixers of a grid, that others are compared with."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.mix.base import GridMixer, Mixer


class IdentityMixer(Mixer):
    """Mixes nothing: every token comes out as it went in."""

    mixes = False
    order_matters = False
    causal = True

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],  # noqa: ARG002
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return x


class MeanMixer(Mixer):
    """Every token becomes the mean of all."""

    order_matters = False

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        return (x.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]).expand_as(x)


class DepthwiseConv(GridMixer):
    """One kernel per channel, the same at every cell; zeros beyond the map.

    Args:
        dim: width of a token.
        size: of the kernel, odd.
        bias: whether each channel has one.
        grid, prefix: as of `GridMixer`.
    """

    def __init__(
        self, dim: int, size: int = 3, *, bias: bool = False, grid: tuple[int, int] | None = None, prefix: int = 0
    ) -> None:
        super().__init__(grid=grid, prefix=prefix)
        require_odd(size=size)
        self.conv = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=bias)

    def mix_grid(
        self,
        x: Float[Tensor, "batch dim rows columns"],
        real: Bool[Tensor, "batch rows columns"],  # noqa: ARG002
    ) -> Float[Tensor, "batch dim rows columns"]:
        return self.conv(x)


class _FixedGrid(GridMixer):
    """Base of what has a number for each pair of cells, so that it fits one grid."""

    def __init__(self, grid: tuple[int, int], prefix: int) -> None:
        if grid is None:
            raise InputError(f"grid: {type(self).__name__} is made for one grid; give its rows and columns")
        super().__init__(grid=grid, prefix=prefix)
        self.cells = grid[0] * grid[1]

    def _fitting(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.grid:
            made, came = (f"{rows} x {columns}" for rows, columns in (self.grid or (0, 0), x.shape[2:]))
            raise InputError(
                f"x: {type(self).__name__} is made for a grid of {made}, got {came}; build one for that size"
            )
        return x.flatten(2)


class SpatialLinear(_FixedGrid):
    """One matrix over the cells, shared by the channels: `y_i = sum_j W_ij x_j`.

    Args:
        grid: rows and columns, the only ones it takes.
        prefix: as of `GridMixer`.
    """

    def __init__(self, grid: tuple[int, int], *, prefix: int = 0) -> None:
        super().__init__(grid, prefix)
        self.fc = nn.Linear(self.cells, self.cells, bias=False)

    def mix_grid(
        self,
        x: Float[Tensor, "batch dim rows columns"],
        real: Bool[Tensor, "batch rows columns"],  # noqa: ARG002
    ) -> Float[Tensor, "batch dim rows columns"]:
        return self.fc(self._fitting(x)).view_as(x)


class FrozenRandomMixer(_FixedGrid):
    """A random matrix over the cells that is never trained, its rows through a softmax.

    Args:
        grid: rows and columns, the only ones it takes.
        seed: of the matrix.
        prefix: as of `GridMixer`.

    Note:
        That rows go through a softmax is inferred; the paper's text was not at hand.
    """

    weights: Tensor

    def __init__(self, grid: tuple[int, int], *, seed: int = 0, prefix: int = 0) -> None:
        super().__init__(grid, prefix)
        drawn = torch.randn(self.cells, self.cells, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("weights", drawn.softmax(-1))

    def mix_grid(
        self, x: Float[Tensor, "batch dim rows columns"], real: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        weights = self.weights * real.flatten(1).unsqueeze(1)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return (self._fitting(x) @ weights.mT).view_as(x)


def require_odd(**given: int) -> None:
    """Raise `InputError` unless each number is odd: an even kernel has no middle.

    >>> require_odd(size=4)
    Traceback (most recent call last):
    cenote.core.errors.InputError: size: expected an odd number, so that the kernel has a middle, got 4
    """
    require_at_least(1, **given)
    for name, number in given.items():
        if number % 2 == 0:
            raise InputError(f"{name}: expected an odd number, so that the kernel has a middle, got {number}")
