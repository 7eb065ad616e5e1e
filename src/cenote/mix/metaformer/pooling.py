"""PoolFormer's mixer: the mean of a neighbourhood, less the token itself.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.mix.base import GridMixer
from cenote.mix.basic.grids import require_odd


class PoolMixer(GridMixer):
    """`y_i = mean of x_j over the real cells j of the window around i, less x_i`; no parameters.

    A block adds `x` already, so that its sum with the mixer's output is the mean alone.

    Args:
        size: rows and columns of the window, odd.
        grid, prefix: as of `GridMixer`.

    Raises:
        InputError: for an even window.

    Example:
        >>> PoolMixer(grid=(1, 3))(torch.tensor([[[0.0], [3.0], [6.0]]])).flatten().tolist()
        [1.5, 0.0, -1.5]

    Source:
        Yu et al. 2022, arXiv 2111.11418, algorithm 1.

    Note:
        That cells which are not real are left out of the mean is inferred; at borders the paper does the same.
    """

    def __init__(self, size: int = 3, *, grid: tuple[int, int] | None = None, prefix: int = 0) -> None:
        super().__init__(grid=grid, prefix=prefix)
        require_odd(size=size)
        self.size = size

    def mix_grid(
        self, x: Float[Tensor, "batch dim rows columns"], real: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        return self._sums(x) / self._sums(real.unsqueeze(1).to(x.dtype)).clamp(min=1) - x

    def _sums(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.size, 1, self.size // 2, divisor_override=1)
