"""Which blocks of a prompt's attention map matter: a gate of pooled queries and keys, what it learns, what is kept by it.

Source: Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (2024), arXiv 2410.13276, NeurIPS 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.rotary import Angles, rotated
from cenote.mix.blocks import Pooling, own_block, pooled, repeated, top_blocks

LATER = -1e9
"""Logit of a block that a query cannot read."""


class BlockGate(nn.Module):
    """A score of each block of keys for each block of queries, from what they are before positions.

    `G = rope(pool_Q(q) W_q) rope(pool_K(k) W_k)^T / sqrt(gate_width)`, positions those at which the blocks begin. With one pool
    of queries and a gate as wide as a head there is no `W_q`, and `W_k` is of each query head; else both are there, `W_k` of
    each head of keys.

    Args:
        width: of a head.
        heads, kv_heads: of queries and of keys.
        block: tokens of a block.
        gate_width: `None` for the width of a head.
        q_pools, k_pools: how blocks are pooled, see `cenote.mix.blocks.pooled`; the order is that of the channels.
        force_double: both matrices, also where one would do.

    Attributes:
        key_maps: `[heads or kv_heads, width * pools, gate_width]`.
        query_maps: `[heads, width * pools, gate_width]`, or None.

    Raises:
        InputError: where heads or pools do not fit.

    Example:
        >>> from cenote.core.rotary import angles
        >>> gate, tokens = BlockGate(8, heads=4, kv_heads=2, block=4), torch.randn(1, 4, 10, 8)
        >>> gate(tokens, tokens[:, :2], angles(torch.arange(0, 10, 4)[None], 8)).shape
        torch.Size([1, 4, 3, 3])

    Source: Gao et al. (2024), arXiv 2410.13276.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        block: int = 64,
        gate_width: int | None = None,
        q_pools: Sequence[Pooling] = ("avg",),
        k_pools: Sequence[Pooling] = ("max", "min", "avg"),
        *,
        force_double: bool = False,
    ) -> None:
        super().__init__()
        gate_width = width if gate_width is None else gate_width
        require_at_least(1, width=width, heads=heads, kv_heads=kv_heads, block=block, gate_width=gate_width)
        if heads % kv_heads:
            raise InputError(f"heads: {heads} heads of queries cannot share {kv_heads} heads of keys")
        if not q_pools or not k_pools:
            raise InputError("q_pools: give at least one way to pool queries, and one for keys")
        self.width, self.heads, self.kv_heads, self.block, self.gate_width = width, heads, kv_heads, block, gate_width
        self.q_pools, self.k_pools = tuple(q_pools), tuple(k_pools)
        self.two_maps = force_double or len(q_pools) > 1 or gate_width != width
        self.key_maps = _maps(kv_heads if self.two_maps else heads, width * len(k_pools), gate_width)
        self.query_maps = _maps(heads, width * len(q_pools), gate_width) if self.two_maps else None

    def forward(
        self,
        q: Float[Tensor, "batch heads tokens width"],
        k: Float[Tensor, "batch kv_heads tokens width"],
        starts: Angles,
        real: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads blocks blocks"]:
        """Logits; `LATER` where a block of keys is later than that of queries, or holds no token.

        Args:
            q, k: before positions, real tokens on the left.
            starts: angles of the positions at which blocks begin, as wide as the gate or less.
            real: False on padding.
        """
        queries = pooled(q, self.block, self.q_pools, real)
        keys = pooled(k, self.block, self.k_pools, real)
        if self.query_maps is None:
            keys = repeated(keys, self.heads)
        else:
            queries = queries @ self.query_maps
        keys = repeated(keys @ self.key_maps, self.heads)
        logits = rotated(queries, starts) @ rotated(keys, starts).mT / math.sqrt(self.gate_width)
        return logits.masked_fill(~earlier(logits, real, self.block), LATER)


def above(
    logits: Float[Tensor, "batch heads blocks blocks"],
    threshold: float,
    real: Bool[Tensor, "batch tokens"] | None = None,
    *,
    block: int = 1,
    keep_diagonal: bool = True,
    last_dense: bool = True,
) -> Bool[Tensor, "batch heads blocks blocks"]:
    """The blocks whose softmax among a row's is above the threshold.

    Args:
        logits: of a gate.
        threshold: 0 for all.
        real: False on padding, `[batch, tokens]` of blocks of `block` tokens.
        block: tokens of a block, where `real` is given.
        keep_diagonal: a query's own block is kept whatever it scores; the authors' code may drop it.
        last_dense: the last two rows of blocks are kept whole.
    """
    require_at_least(0, threshold=threshold)
    # the smallest softmax may be rounded to 0
    kept = logits.softmax(-1) > threshold if threshold else torch.ones_like(logits, dtype=torch.bool)
    return _kept(logits, kept, real, block, keep_diagonal, last_dense)


def top_share(
    logits: Float[Tensor, "batch heads blocks blocks"],
    share: float,
    real: Bool[Tensor, "batch tokens"] | None = None,
    *,
    block: int = 1,
    keep_diagonal: bool = True,
    last_dense: bool = True,
) -> Bool[Tensor, "batch heads blocks blocks"]:
    """The highest `max(1, floor((1 - sqrt(1 - share)) n))` of a row's n blocks, which of a causal map is about that share.

    Args:
        logits: of a gate.
        share: of the causal map, 1 for all.
        real, block, keep_diagonal, last_dense: as of `above`.

    Raises:
        InputError: for no share.
    """
    if not 0 < share <= 1:
        raise InputError(f"share: expected more than 0 and at most 1, got {share}")
    blocks = _blocks(logits, real, block)
    keep = torch.tensor([max(1, int((1 - math.sqrt(1 - share)) * n)) for n in blocks.tolist()], device=logits.device)
    return _kept(logits, top_blocks(logits, keep), real, block, keep_diagonal, last_dense)


def _maps(heads: int, into: int, out: int) -> nn.Parameter:
    maps = torch.empty(heads, into, out)
    for one in maps:
        nn.init.xavier_uniform_(one)
    return nn.Parameter(maps)


def _blocks(logits: Tensor, real: Tensor | None, block: int) -> Int[Tensor, "batch"]:
    """How many blocks each item has."""
    if real is None:
        return torch.full((len(logits),), logits.shape[-1], device=logits.device)
    return -(-real.sum(1) // block)


def earlier(logits: Tensor, real: Tensor | None, block: int) -> Bool[Tensor, "batch 1 blocks blocks"]:
    """Which blocks of keys a block of queries may read."""
    at = own_block(logits.shape[-1], 1, logits.device)
    there = at < _blocks(logits, real, block)[:, None]
    return (at <= at[:, None])[None, None] & there[:, None, None] & there[:, None, :, None]


def _kept(
    logits: Tensor, kept: Tensor, real: Tensor | None, block: int, keep_diagonal: bool, last_dense: bool
) -> Bool[Tensor, "batch heads blocks blocks"]:
    at = own_block(logits.shape[-1], 1, logits.device)
    if keep_diagonal:
        kept = kept | (at == at[:, None])
    if last_dense:
        kept = kept | (at >= _blocks(logits, real, block)[:, None] - 2)[:, None, :, None]
    return kept & earlier(logits, real, block)
