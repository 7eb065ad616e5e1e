"""Other convolutions whose kernels depend on what they read.

Source: as of each class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.mix.attentive_convolution.convolution import convolved
from cenote.mix.base import GridMixer
from cenote.mix.basic.grids import require_odd


class DynamicConv(GridMixer):
    """A depthwise convolution whose kernel is a mixture of some kernels; the mean of the image says in which shares.

    Args:
        dim: width of a token.
        size: of the kernels, odd.
        kernels: how many are mixed.
        grid, prefix: as of `GridMixer`.

    Source:
        Chen et al. 2020, arXiv 1912.03458, with depthwise kernels.
    """

    def __init__(
        self, dim: int, size: int = 3, *, kernels: int = 4, grid: tuple[int, int] | None = None, prefix: int = 0
    ) -> None:
        super().__init__(grid=grid, prefix=prefix)
        require_odd(size=size)
        require_at_least(1, dim=dim, kernels=kernels)
        self.dim = dim
        self.kernels = nn.Parameter(torch.randn(kernels, dim, size, size) / size)
        self.shares = nn.Sequential(nn.Linear(dim, max(dim // 4, 1)), nn.ReLU(), nn.Linear(max(dim // 4, 1), kernels))

    def mix_grid(
        self, x: Float[Tensor, "batch dim rows columns"], real: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        mean = x.sum((2, 3)) / real.sum((1, 2)).clamp(min=1).unsqueeze(1)
        shares = self.shares(mean).softmax(-1)
        return convolved(x, torch.einsum("be,ecij->bcij", shares, self.kernels))


class Involution(GridMixer):
    """Each cell makes its own kernel, shared by the channels of a group: `y_i = sum_j K(x_i)_(j - i) x_j`.

    Args:
        dim: width of a token.
        size: of the kernels, odd.
        groups: of channels.
        grid, prefix: as of `GridMixer`.

    Source:
        Li et al. 2021, arXiv 2103.06255.
    """

    def __init__(
        self, dim: int, size: int = 3, *, groups: int = 1, grid: tuple[int, int] | None = None, prefix: int = 0
    ) -> None:
        super().__init__(grid=grid, prefix=prefix)
        require_odd(size=size)
        require_at_least(1, dim=dim, groups=groups)
        self.dim = dim
        if dim % groups:
            raise InputError(f"groups: expected a divisor of dim = {dim}, got {groups}")
        self.size, self.groups = size, groups
        self.narrow = nn.Conv2d(dim, max(dim // 4, 1), 1)
        self.wide = nn.Conv2d(max(dim // 4, 1), groups * size**2, 1)

    def mix_grid(
        self,
        x: Float[Tensor, "batch dim rows columns"],
        real: Bool[Tensor, "batch rows columns"],  # noqa: ARG002
    ) -> Float[Tensor, "batch dim rows columns"]:
        kernels = self.wide(self.narrow(x).relu()).unflatten(1, (self.groups, 1, self.size**2))
        around = F.unfold(x, self.size, padding=self.size // 2).unflatten(-1, x.shape[2:])
        around = around.unflatten(1, (self.groups, -1, self.size**2))
        return (kernels * around).sum(3).flatten(1, 2)
