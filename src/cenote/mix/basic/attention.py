"""Softmax attention as a mixer: over all tokens, over those before, or over windows of a grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.requirements import require_at_least, require_heads
from cenote.mix.base import GridMixer, Mixer


class AttentionMixer(Mixer):
    """`softmax(q k^T / sqrt(head_dim)) v` by head, joined and projected.

    Args:
        dim: width of a token.
        heads: number of heads; None for heads of 32 channels, one where there are fewer.
        bias: whether queries, keys and values have one; the output has.
        causal: whether a token reads only those before it and itself.

    Raises:
        InputError: where heads do not divide the width.
    """

    order_matters = False

    def __init__(self, dim: int, heads: int | None = None, *, bias: bool = False, causal: bool = False) -> None:
        super().__init__()
        heads = max(dim // 32, 1) if heads is None else heads
        require_heads(dim, heads)
        self.dim, self.heads, self.causal, self.order_matters = dim, heads, causal, causal
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self._projected(x)
        read = F.scaled_dot_product_attention(q, k, v, self._may_read(mask))
        return self.proj(read.transpose(1, 2).flatten(2))

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        mask, _ = self._checked(x, mask, positions)
        q, k, _ = self._projected(x.masked_fill(~mask.unsqueeze(-1), 0.0))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~self._may_read(mask), -torch.inf).softmax(-1)
        return weights.masked_fill(~mask[:, None, :, None], 0.0)

    def values_of(
        self, x: Float[Tensor, "batch tokens dim"]
    ) -> tuple[Float[Tensor, "batch heads tokens width"], nn.Linear]:
        """What weights sum up, and what maps the heads' sums, joined, to the output."""
        return self._projected(x)[2], self.proj

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _may_read(self, mask: Tensor) -> Tensor:
        n = mask.shape[1]
        own = torch.eye(n, dtype=torch.bool, device=mask.device)
        seen = mask[:, None, None, :].expand(-1, 1, n, -1)
        # a row that reads nothing would be NaN; padding reads itself and is dropped
        return (seen & torch.ones_like(own).tril() if self.causal else seen) | own


class WindowAttention(GridMixer):
    """Self-attention within windows of a grid that do not overlap; a window at the border holds fewer cells.

    Args:
        dim: width of a token.
        window: rows and columns of a window.
        heads, bias: as of `AttentionMixer`.
        grid, prefix: as of `GridMixer`.
    """

    def __init__(
        self,
        dim: int,
        window: int = 7,
        heads: int | None = None,
        *,
        bias: bool = False,
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
    ) -> None:
        super().__init__(grid=grid, prefix=prefix)
        require_at_least(1, window=window)
        self.window = window
        self.attention = AttentionMixer(dim, heads, bias=bias)

    def mix_grid(
        self, x: Float[Tensor, "batch dim rows columns"], real: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        w, (rows, columns) = self.window, x.shape[2:]
        beyond = (0, -columns % w, 0, -rows % w)
        x, inside = F.pad(x, beyond), F.pad(real, beyond)
        down, across = x.shape[2] // w, x.shape[3] // w
        tokens = (
            x.unflatten(3, (across, w)).unflatten(2, (down, w)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)
        )
        seen = (
            inside.unflatten(2, (across, w)).unflatten(1, (down, w)).permute(0, 1, 3, 2, 4).flatten(0, 2).flatten(1, 2)
        )
        mixed = self.attention(tokens, seen).unflatten(1, (w, w)).unflatten(0, (-1, down, across))
        return mixed.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)[:, :, :rows, :columns]
