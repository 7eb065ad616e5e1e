"""Which blocks of the cache a new token reads: one gate query per group of heads, one compressed key per block.

Source: Gao et al., "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning" (2025), arXiv 2506.08889.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.rotary import Angles, rotated
from cenote.mix.blocks import Pooling, count, pooled, row_maxima, top_blocks

Query = Literal["proj", "avgproj", "avg", "orig"]
BlockRope = Literal["start", "end"]
MASKED = -1e20
"""Score of a block that does not count."""
EPSILON = 1e-9
"""Added to the sums of targets."""


class GroupGate(nn.Module):
    """A score of each block of the cache for each token and head of keys, from what they are before positions.

    `s_kj = rope_p(norm(qg_k)) . rope(norm(Kg_j)) / sqrt(gate_width)`, with `qg_k = sum_g q_kg W_kg` over the heads of a group
    and `Kg_j = [max; min; avg] W_k` of the keys of block j.

    Args:
        width: of a head.
        heads, kv_heads: of queries and of keys.
        block: tokens of a block.
        gate_width: `None` for the width of a head.
        query: `"proj"` as above; `"avgproj"` a projection of the mean over the group; `"avg"` the mean alone; `"orig"` each
            query as it is, their scores averaged over the group.
        k_pools: how blocks of keys are pooled; the order is that of the channels.
        norm: RMSNorm behind both projections.
        blind: one learned vector per head of keys in place of the query, which then cannot matter; a control.

    Attributes:
        query_maps: `[kv_heads, group, width, gate_width]` of `"proj"`, `[kv_heads, width, gate_width]` of `"avgproj"`, or None.
        key_maps: `[kv_heads, width * pools, gate_width]`.

    Raises:
        InputError: where heads do not come apart into groups, or a query without projection has another width than the gate.

    Example:
        >>> from cenote.core.rotary import angles
        >>> gate, tokens = GroupGate(8, heads=4, kv_heads=2, block=4), torch.randn(1, 4, 10, 8)
        >>> keys = gate.keys(tokens[:, :2], angles(torch.arange(0, 10, 4)[None], 8))
        >>> gate.scores(gate.queries(tokens, angles(torch.arange(10)[None], 8)), keys).shape
        torch.Size([1, 2, 10, 3])

    Source: Gao et al. (2025), arXiv 2506.08889.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        block: int = 64,
        gate_width: int | None = None,
        query: Query = "proj",
        k_pools: Sequence[Pooling] = ("max", "min", "avg"),
        *,
        norm: bool = True,
        blind: bool = False,
    ) -> None:
        super().__init__()
        gate_width = width if gate_width is None else gate_width
        require_at_least(1, width=width, heads=heads, kv_heads=kv_heads, block=block, gate_width=gate_width)
        require_one_of(get_args(Query), query=query)
        if heads % kv_heads:
            raise InputError(f"heads: {heads} heads of queries cannot share {kv_heads} heads of keys")
        if query in ("avg", "orig") and gate_width != width:
            raise InputError(f"gate_width: a query without a projection is {width} wide, got {gate_width}")
        if not k_pools:
            raise InputError("k_pools: give at least one way to pool keys")
        group = heads // kv_heads
        self.width, self.heads, self.kv_heads, self.block = width, heads, kv_heads, block
        self.gate_width, self.query, self.k_pools = gate_width, query, tuple(k_pools)
        shapes = {"proj": (kv_heads, group, width, gate_width), "avgproj": (kv_heads, width, gate_width)}
        self.query_maps = _xavier(*shapes[query]) if query in shapes and not blind else None
        self.key_maps = _xavier(kv_heads, width * len(k_pools), gate_width)
        self.query_norm = nn.RMSNorm(gate_width, eps=1e-6) if norm else nn.Identity()
        self.key_norm = nn.RMSNorm(gate_width, eps=1e-6) if norm else nn.Identity()
        self.blind = nn.Parameter(torch.randn(kv_heads, gate_width)) if blind else None

    def queries(
        self, q: Float[Tensor, "batch heads tokens width"], at: Angles
    ) -> Float[Tensor, "batch gate_heads tokens gate_width"]:
        """Gate queries, one per head of keys; of `"orig"` one per head of queries.

        Args:
            q: before positions.
            at: angles of their positions.
        """
        grouped = q.unflatten(1, (self.kv_heads, -1))
        if self.blind is not None:
            asked = self.blind[None, :, None].expand(len(q), -1, q.shape[2], -1)
        elif self.query_maps is not None and self.query == "proj":
            asked = (grouped @ self.query_maps).sum(2)
        elif self.query_maps is not None:
            asked = grouped.mean(2) @ self.query_maps
        else:
            asked = q if self.query == "orig" else grouped.mean(2)
        return rotated(self.query_norm(asked), at)

    def keys(
        self,
        k: Float[Tensor, "batch kv_heads tokens width"],
        at: Angles,
        real: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch kv_heads blocks gate_width"]:
        """One compressed key per block.

        Args:
            k: before positions.
            at: angles of the positions of blocks.
            real: False on padding, which takes no part.
        """
        return rotated(self.key_norm(pooled(k, self.block, self.k_pools, real) @ self.key_maps), at)

    def scores(
        self,
        queries: Float[Tensor, "batch gate_heads tokens gate_width"],
        keys: Float[Tensor, "batch kv_heads blocks gate_width"],
        valid: Bool[Tensor, "batch tokens blocks"] | None = None,
    ) -> Float[Tensor, "batch kv_heads tokens blocks"]:
        """Before the softmax over blocks; `MASKED` where a block is not valid.

        Args:
            queries, keys: as above made.
            valid: which blocks a token may read.
        """
        grouped = queries.unflatten(1, (keys.shape[1], -1))
        scores = (grouped @ keys[:, :, None].mT).mean(2) / math.sqrt(self.gate_width)
        return scores if valid is None else scores.masked_fill(~valid[:, None], MASKED)


def select(
    scores: Float[Tensor, "batch kv_heads tokens blocks"],
    *,
    budget: int | None = None,
    threshold: float | None = None,
    block: int = 1,
    valid: Bool[Tensor, "batch tokens blocks"] | None = None,
) -> Bool[Tensor, "batch kv_heads tokens blocks"]:
    """Which blocks are read: the best of a budget, or those whose softmax is above a threshold; the last valid one always.

    The last block, which may be unfinished, comes on top of the budget; a budget below one block leaves it alone.

    Args:
        scores: of a gate.
        budget: tokens; `budget // block` blocks.
        threshold: of the softmax over blocks.
        block: tokens of a block.
        valid: which blocks a token may read.

    Raises:
        InputError: unless either a budget or a threshold is given.

    Example:
        >>> select(torch.tensor([[[[3.0, 1.0, 2.0, 0.0]]]]), budget=2)
        tensor([[[[ True, False,  True,  True]]]])
    """
    if (budget is None) == (threshold is None):
        raise InputError("budget: give either a budget of tokens or a threshold")
    blocks = scores.shape[-1]
    if valid is None:
        valid = torch.ones(scores.shape[0], *scores.shape[2:], dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(~valid[:, None], MASKED)
    if threshold is not None:
        require_at_least(0, threshold=threshold)
        kept = scores.softmax(-1) > threshold
    else:
        assert budget is not None
        require_at_least(0, budget=budget)
        kept = top_blocks(scores, budget // block)
    at = torch.arange(blocks, device=scores.device)
    last = torch.where(valid, at, -1).amax(-1, keepdim=True)
    return (kept | (at == last)[:, None]) & valid[:, None]


class CompressedKeys:
    """The compressed keys of a cache as it grows: what a gate scores.

    A block that is not full has a key of zeros, and its tokens wait as they are; the token that fills it brings its key.

    Args:
        gate: makes them.
        rope: position that a block has: of its first token; `"end"`: of a block that decoding filled that of its last, as in
            the authors' code, where those of the prompt have their first.

    Attributes:
        keys: `[batch, kv_heads, blocks, gate_width]`.
        tokens: how many there are.
        real: `[batch, blocks]`, False for a block of padding alone.

    Example:
        >>> from cenote.core.rotary import angles
        >>> gate, k = GroupGate(8, heads=4, kv_heads=2, block=4), torch.randn(1, 2, 10, 8)
        >>> at = angles(torch.arange(10)[None], 8)
        >>> cache = CompressedKeys(gate)
        >>> cache.append(k[:, :, :7], at.at(torch.arange(7)[None]))
        >>> cache.append(k[:, :, 7:8], at.at(torch.tensor([[7]])))
        >>> cache.keys.shape, bool((cache.keys[:, :, 1] != 0).any())
        (torch.Size([1, 2, 2, 8]), True)
    """

    def __init__(self, gate: GroupGate, rope: BlockRope = "start") -> None:
        require_one_of(get_args(BlockRope), rope=rope)
        self.gate, self.rope = gate, rope
        self.tokens = 0
        self.keys: Tensor = torch.empty(0)
        self.real: Tensor = torch.empty(0)
        self._waiting: Tensor | None = None
        self._there: Tensor | None = None
        self._at: Angles | None = None

    def append(
        self,
        k: Float[Tensor, "batch kv_heads tokens width"],
        at: Angles,
        real: Bool[Tensor, "batch tokens"] | None = None,
    ) -> None:
        """These tokens are in the cache too.

        Args:
            k: keys before positions.
            at: angles of their positions.
            real: False on padding.
        """
        block, decoding = self.gate.block, self.tokens > 0
        real = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device) if real is None else real
        at = Angles(*(x.expand(len(k), -1, -1) for x in at))
        if self._waiting is not None and self._there is not None and self._at is not None:
            k, real = torch.cat([self._waiting, k], 2), torch.cat([self._there, real], 1)
            at = Angles(*(torch.cat(pair, 1) for pair in zip(self._at, at, strict=True)))
        full = k.shape[2] // block * block
        keys = (
            self.keys[:, :, : self.tokens // block] if decoding else k.new_zeros(*k.shape[:2], 0, self.gate.gate_width)
        )
        known = self.real[:, : self.tokens // block] if decoding else real[:, :0]
        self.tokens = known.shape[1] * block + k.shape[2]
        there = real[:, :full].unflatten(1, (-1, block))
        if full:
            chosen = block_starts(real[:, :full], block)
            if self.rope == "end" and decoding:
                chosen = torch.arange(block - 1, full, block, device=k.device).expand(len(k), -1)
            keys = torch.cat([keys, self.gate.keys(k[:, :, :full], at.at(chosen), real[:, :full])], 2)
        known = torch.cat([known, there.any(-1)], 1)
        self._waiting, self._there = k[:, :, full:], real[:, full:]
        self._at = Angles(*(x[:, full:] for x in at))
        if k.shape[2] > full:
            keys = torch.cat([keys, keys.new_zeros(*keys.shape[:2], 1, keys.shape[-1])], 2)
            known = torch.cat([known, self._there.any(1, keepdim=True)], 1)
        self.keys, self.real = keys, known


def row_target(
    q: Float[Tensor, "batch heads rows width"],
    k: Float[Tensor, "batch kv_heads keys width"],
    block: int,
    real: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch kv_heads rows blocks"]:
    """What a gate learns: of each token the largest true weight in each block, over the heads of a group, rows divided by sums.

    One block of keys at a time; no tokens x tokens map is made.

    Args:
        q, k: after positions; the queries are those of the last tokens.
        block: tokens of a block.
        real: False on padding.
        scale: of scores.

    Example:
        >>> q = torch.randn(1, 4, 3, 8)
        >>> bool((row_target(q, torch.randn(1, 2, 9, 8), block=4).sum(-1) > 0.99).all())
        True
    """
    tops, log = row_maxima(q, k, block, real, scale)
    weights = (tops - log[..., None]).exp().unflatten(1, (k.shape[1], -1)).amax(2)
    return weights / (weights.sum(-1, keepdim=True) + EPSILON)


def block_starts(real: Bool[Tensor, "batch tokens"], block: int) -> Int[Tensor, "batch blocks"]:
    """The first real token of each block, or its first where none is.

    >>> block_starts(torch.tensor([[False, False, False, True, True]]), 2).tolist()
    [[0, 3, 4]]
    """
    there = nn.functional.pad(real, (0, -real.shape[1] % block)).unflatten(1, (-1, block))
    first = torch.arange(0, real.shape[1], block, device=real.device)
    return there.to(torch.uint8).argmax(-1) + first


def valid_blocks(
    rows: Int[Tensor, "rows"], tokens: int, block: int, real: Bool[Tensor, "batch tokens"]
) -> Bool[Tensor, "batch rows blocks"]:
    """Blocks that tokens of these numbers may read: begun by then, and not of padding alone."""
    starts = torch.arange(0, count(tokens, block) * block, block, device=rows.device)
    there = nn.functional.pad(real, (0, len(starts) * block - tokens)).unflatten(1, (-1, block)).any(-1)
    return (starts <= rows[:, None])[None] & there[:, None]


def _xavier(*shape: int) -> nn.Parameter:
    maps = torch.empty(shape)
    for one in maps.flatten(0, -3):
        nn.init.xavier_uniform_(one)
    return nn.Parameter(maps)
