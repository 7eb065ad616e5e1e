"""Token-aware average pooling: each cell becomes a mixture of means of its neighbourhood, at distances it chooses itself.

Source: Guo, Stutz, Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.requirements import require_at_least, require_positive
from cenote.mix.base import GridMixer

TAPS = 9


class TokenAwarePooled(NamedTuple):
    """What token-aware pooling gives.

    Attributes:
        output: the mixed cells.
        weights: what each cell took of each distance, from 0 on; they sum to 1.
    """

    output: Float[Tensor, "batch dim rows columns"]
    weights: Float[Tensor, "batch rows columns scales"]


class TokenAwarePooling(GridMixer):
    """`y_i = sum_d m_id P_d(x)_i`: `P_0` is the cell, `P_d` the mean of the nine cells at distance `d` and itself.

    `m_i = softmax_d(C_2(BN(C_1 x))_i / temperature)`, with convolutions of 3 x 3; the same weights for all channels. Beyond the
    map stand zeros, which count: the sum of nine is always divided by nine.

    Args:
        dim: width of a token.
        scales: distances 0 to `scales` - 1; 1 changes nothing.
        temperature: of the softmax.
        grid, prefix: as of `GridMixer`; class tokens stand in the prefix.

    Raises:
        InputError: for fewer than one scale.

    Example:
        >>> pooling = TokenAwarePooling(8, grid=(4, 6), prefix=1)
        >>> pooling(torch.randn(2, 25, 8)).shape
        torch.Size([2, 25, 8])

    Source:
        Guo et al. 2023, arXiv 2303.11126, section 4.1.

    Note:
        Cells that are not real count as those beyond the map; the paper knows none.
    """

    def __init__(
        self,
        dim: int,
        scales: int = 4,
        *,
        temperature: float = 1.0,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
    ) -> None:
        super().__init__(grid=grid, prefix=prefix)
        require_at_least(1, dim=dim, scales=scales)
        require_positive(temperature=temperature)
        self.dim, self.scales, self.temperature = dim, scales, temperature
        self.first = nn.Conv2d(dim, scales, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(scales)
        self.second = nn.Conv2d(scales, scales, 3, padding=1, bias=False)

    def mix_grid(
        self, x: Float[Tensor, "batch dim rows columns"], real: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        return self.pooled(x, real).output

    def pooled(
        self,
        x: Float[Tensor, "batch dim rows columns"],
        real: Bool[Tensor, "batch rows columns"] | None = None,
    ) -> TokenAwarePooled:
        """The mixed cells, and what each took of each distance.

        Args:
            x: zeros where `real` is False.
            real: False where an image has no cell; None for all.
        """
        normed = self.norm(self.first(x))
        if real is not None:
            # what a normalisation makes of nothing is no cell either
            normed = normed * real.unsqueeze(1)
        weights = (self.second(normed) / self.temperature).softmax(1)
        mixed = weights[:, :1] * x
        for d in range(1, self.scales):
            mixed = mixed + weights[:, d : d + 1] * dilated_mean(x, d)
        return TokenAwarePooled(mixed, weights.movedim(1, -1))


class DilatedMean(GridMixer):
    """The mean of nine cells at one distance, the same for all: what token-aware pooling is compared with.

    Args:
        distance: 1 for neighbours.
        grid, prefix: as of `GridMixer`.
    """

    def __init__(self, distance: int = 1, *, grid: tuple[int, int] | None = None, prefix: int = 0) -> None:
        super().__init__(grid=grid, prefix=prefix)
        require_at_least(1, distance=distance)
        self.distance = distance

    def mix_grid(
        self,
        x: Float[Tensor, "batch dim rows columns"],
        real: Bool[Tensor, "batch rows columns"],  # noqa: ARG002
    ) -> Float[Tensor, "batch dim rows columns"]:
        return dilated_mean(x, self.distance)


def dilated_mean(x: Float[Tensor, "batch dim rows columns"], distance: int) -> Float[Tensor, "batch dim rows columns"]:
    """`P_d(x)_ij = (1/9) sum_ab x_(i + a d, j + b d)`, `a`, `b` in -1, 0, 1; zeros beyond the map."""
    rows, columns = x.shape[2:]
    padded = F.pad(x, (distance,) * 4)
    # rows first, then columns: six sums for nine
    tall = sum(padded[:, :, a : a + rows] for a in (0, distance, 2 * distance))
    assert isinstance(tall, Tensor)
    wide = sum(tall[..., b : b + columns] for b in (0, distance, 2 * distance))
    assert isinstance(wide, Tensor)
    return wide / TAPS


def extra_parameters(dim: int, scales: int = 4) -> int:
    """Parameters that token-aware pooling adds to a block: `9 dim K + 9 K^2 + 2 K`.

    >>> extra_parameters(384)
    13976
    """
    return TAPS * dim * scales + TAPS * scales**2 + 2 * scales


def extra_products(dim: int, scales: int = 4) -> int:
    """Multiply-adds that it adds per token: two convolutions, and the sums of each distance but 0.

    >>> extra_products(384)
    24336
    """
    return TAPS * dim * scales + TAPS * scales**2 + TAPS * dim * (scales - 1)
