"""Attention whose number of heads and whose rank are chosen apart.

Source: Amsel, Yehudai and Bruna, "On the Benefits of Rank in Attention Layers" (2024), arXiv 2407.16153.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least, require_mask, require_one_of, require_positive
from cenote.mix.base import Mixer
from cenote.mix.normalisers import one_hot, softmax

Scale = Literal["dim", "rank"]


class RankAttention(Mixer):
    """Heads of rank r, values and output as one full map each.

        y_i = sum_h VO_h^T sum_j a_hij x_j,   a_hi = softmax_j( (Q_h y_i) . (K_h x_j) / sqrt(r) )

    As a mixer the tokens attend to themselves; `attend(x, y)` has queries of their own. Parameters: `2 H r d + H d^2`.

    Args:
        dim: d, of the tokens.
        rank: r, of queries and keys of a head; any number, it need not be `dim / heads`.
        heads: H.
        hard: one-hot at the largest score in place of softmax; no gradient reaches Q and K.
        scale: what scores are divided by: `sqrt(rank)` or `sqrt(dim)`; the authors' code has had both.

    Example:
        >>> layer = RankAttention(8, rank=2, heads=4)
        >>> layer(torch.randn(1, 5, 8)).shape, layer.attend(torch.randn(1, 5, 8), torch.randn(1, 3, 8)).shape
        (torch.Size([1, 5, 8]), torch.Size([1, 3, 8]))

    Source: Amsel et al. (2024), arXiv 2407.16153.
    """

    order_matters = False

    def __init__(self, dim: int, rank: int, heads: int = 1, hard: bool = False, scale: Scale = "rank") -> None:
        super().__init__()
        require_at_least(1, dim=dim, rank=rank, heads=heads)
        require_one_of(get_args(Scale), scale=scale)
        self.dim, self.rank, self.heads, self.hard = dim, rank, heads, hard
        self.scale = scale
        inside, outside = math.sqrt(6 / (rank + dim)), math.sqrt(6 / (heads * dim + dim))
        self.query = nn.Parameter(torch.empty(heads, rank, dim).uniform_(-inside, inside))
        self.key = nn.Parameter(torch.empty(heads, rank, dim).uniform_(-inside, inside))
        self.value_output = nn.Parameter(torch.empty(heads, dim, dim).uniform_(-outside, outside))

    @classmethod
    def exact(cls, dim: int, temperature: float = 1.0, hard: bool = True) -> RankAttention:
        """One head of full rank, all maps the identity: with hard attention it gives the nearest of any number of points.

        Args:
            temperature: factor on the scores, for soft attention.
        """
        require_positive(temperature=temperature)
        layer = cls(dim, dim, 1, hard)
        with torch.no_grad():
            layer.query.copy_(temperature * torch.eye(dim))
            layer.key.copy_(torch.eye(dim))
            layer.value_output.copy_(torch.eye(dim))
        return layer

    @classmethod
    def majority(cls, dim: int, rank: int, heads: int, hard: bool = True, temperature: float = 1.0) -> RankAttention:
        """Random projections with Q = K of orthonormal rows, VO = I / H: the mean of what the heads vote for."""
        layer = cls(dim, rank, heads, hard)
        with torch.no_grad():
            projections = torch.linalg.qr(torch.randn(heads, dim, dim))[0][:, :rank]
            layer.query.copy_(temperature * projections)
            layer.key.copy_(projections)
            layer.value_output.copy_(torch.eye(dim) / heads)
        return layer

    def attend(
        self,
        x: Float[Tensor, "batch keys dim"],
        y: Float[Tensor, "batch queries dim"],
        mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Queries `y` over `x`; True in the mask = a real key."""
        require_mask(x.shape[:2], mask=mask)
        x = cleared(x, mask)
        weights = self._weights(x, y, mask)
        return torch.einsum("bhqk,bkd,hde->bqe", weights, x, self.value_output)

    def mix(self, x: Tensor, mask: Tensor, positions: Tensor) -> Float[Tensor, "batch tokens dim"]:  # noqa: ARG002
        return self.attend(x, x, mask)

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        mask, _ = self._checked(x, mask, positions)
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self._weights(x, x, mask) * mask[:, None, :, None]

    def _weights(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Float[Tensor, "batch heads queries keys"]:
        q = torch.einsum("bqd,hrd->bhqr", y, self.query)
        k = torch.einsum("bkd,hrd->bhkr", x, self.key)
        scores = q @ k.mT / math.sqrt(self.dim if self.scale == "dim" else self.rank)
        seen = None if mask is None else mask[:, None, None, :]
        if not self.hard:
            return softmax(scores, seen)
        if seen is None:
            return one_hot(scores)
        return one_hot(scores.masked_fill(~seen, -math.inf)) * seen

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}, heads={self.heads}, hard={self.hard}"
