"""Attentive convolution: an image makes its own depthwise kernels.

Source: Yu et al., "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency", 2025.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.base import GridMixer
from cenote.mix.basic.grids import require_odd
from cenote.mix.maps import start_narrow
from cenote.mix.metaformer.block import Activation

Summary = Literal["strips", "grid"]


class ATConv(GridMixer):
    """`y = P (K(x) * V x)`: each channel of each image is convolved with a kernel that a summary of the image made.

    With `s` the means of `U x` over `size^2` strips of cells, row by row, and one matrix `G` for all channels:

        K' = G act(s),   K = K' - sigmoid(d_c) mean(K')

    Args:
        dim: width of a token.
        size: rows and columns of a kernel, odd.
        act: builds the activation.
        bias: whether the maps have biases.
        summary: `"strips"` of cells in reading order, as released, or a `"grid"` of regions, as in older drafts.
        route: False learns one kernel per channel, for all images.
        inhibit: False subtracts nothing from the kernels.
        bottleneck: width between the channels in which older drafts make kernels; None for one matrix over the summary.
        grid, prefix: as of `GridMixer`.

    Raises:
        InputError: for an even kernel.

    Example:
        >>> mixer = ATConv(8, grid=(4, 6))
        >>> x = torch.randn(2, 24, 8)
        >>> mixer(x).shape, mixer.kernels(x.mT.unflatten(-1, (4, 6))).shape
        (torch.Size([2, 24, 8]), torch.Size([2, 8, 3, 3]))

    Source:
        Yu et al. 2025, arXiv 2510.20092. Parameters carry the names of the authors' code.

    Note:
        Cells that are not real take part in no mean and in no sum; the paper knows none. That even kernels are refused is
        inferred: they would enlarge the map.
    """

    def __init__(
        self,
        dim: int,
        size: int = 3,
        *,
        act: Activation = nn.GELU,
        bias: bool = True,
        summary: Summary = "strips",
        route: bool = True,
        inhibit: bool = True,
        bottleneck: int | None = None,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
    ) -> None:
        super().__init__(grid=grid, prefix=prefix)
        require_at_least(1, dim=dim)
        self.dim = dim
        require_odd(size=size)
        require_one_of(("strips", "grid"), summary=summary)
        self.size, self.summary = size, summary
        self.kernel_proj = nn.Conv2d(dim, dim, 1, bias=bias) if route else None
        self.narrow: nn.Module | None = None
        if bottleneck is not None:
            require_at_least(1, bottleneck=bottleneck)
            self.narrow = nn.Sequential(nn.Linear(dim, bottleneck), act(), nn.Linear(bottleneck, dim))
        self.act = act()
        self.kernel_gen = nn.Linear(size**2, size**2, bias=bias) if route else None
        self.static = None if route else nn.Parameter(nn.init.trunc_normal_(torch.empty(dim, size**2), std=0.02))
        self.x_proj = nn.Conv2d(dim, dim, 1, bias=bias)
        self.proj = nn.Conv2d(dim, dim, 1, bias=bias)
        self.difference_control = nn.Parameter(torch.zeros(dim)) if inhibit else None
        start_narrow(self)

    def mix_grid(
        self, x: Float[Tensor, "batch dim rows columns"], real: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        values = self.x_proj(x) * real.unsqueeze(1)
        return self.proj(convolved(values, self.kernels(x, real)))

    def kernels(
        self,
        x: Float[Tensor, "batch dim rows columns"],
        real: Bool[Tensor, "batch rows columns"] | None = None,
    ) -> Float[Tensor, "batch dim size size"]:
        """The kernels that each image makes: where each of its channels looks.

        Args:
            x: a feature map.
            real: False where an image has no cell; None for all.
        """
        if self.static is not None:
            made = self.static.expand(len(x), -1, -1)
        else:
            assert self.kernel_proj is not None
            assert self.kernel_gen is not None
            u = self.kernel_proj(x)
            seen = u.new_ones(len(u), 1, *u.shape[2:]) if real is None else real.unsqueeze(1).to(u.dtype)
            share = self._means(seen)
            s = self._means(u * seen) / share.clamp(min=torch.finfo(u.dtype).eps)
            if self.narrow is not None:
                s = self.narrow(s.mT).mT
            made = self.kernel_gen(self.act(s))
        if self.difference_control is not None:
            made = made - self.difference_control.sigmoid()[:, None] * made.mean(-1, keepdim=True)
        return made.unflatten(-1, (self.size, self.size))

    def _means(self, u: Tensor) -> Float[Tensor, "batch channels bins"]:
        if self.summary == "strips":
            return F.adaptive_avg_pool1d(u.flatten(2), self.size**2)
        return F.adaptive_avg_pool2d(u, self.size).flatten(2)


def convolved(
    x: Float[Tensor, "batch dim rows columns"], kernels: Float[Tensor, "batch dim size size"]
) -> Float[Tensor, "batch dim rows columns"]:
    """Each channel of each image with its own kernel, zeros beyond the map."""
    batch, dim, size = kernels.shape[:3]
    flat = x.reshape(1, batch * dim, *x.shape[2:])
    return F.conv2d(flat, kernels.reshape(-1, 1, size, size), padding=size // 2, groups=batch * dim).view_as(x)
