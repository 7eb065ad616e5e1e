"""Attention among blocks of keys: tokens cut into blocks, blocks pooled, and attention that reads chosen blocks alone.

Tokens are counted from 0 within each item, so that padding, wherever it stands, moves no block: `leftward` lays the real ones
to the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from cenote.core import grouped
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_several

Pooling = Literal["max", "min", "avg"]


class Leftward(NamedTuple):
    """Real tokens on the left.

    Attributes:
        order: number of the token that stands at each slot, `[batch, tokens]`.
        real: slots that hold a real token.
    """

    order: Int[Tensor, "batch tokens"]
    real: Bool[Tensor, "batch tokens"]

    def laid(self, x: Shaped[Tensor, "batch heads tokens *width"]) -> Shaped[Tensor, "batch heads tokens *width"]:
        """Tokens in that order; padding behind them."""
        return x.gather(2, self._wide(self.order, x))

    def back(self, x: Shaped[Tensor, "batch heads tokens *width"]) -> Shaped[Tensor, "batch heads tokens *width"]:
        """Each where it stood."""
        return x.gather(2, self._wide(self.order.argsort(1), x))

    @staticmethod
    def _wide(order: Tensor, x: Tensor) -> Tensor:
        return order.view(len(order), 1, -1, *[1] * (x.dim() - 3)).expand_as(x)


def leftward(mask: Bool[Tensor, "batch tokens"]) -> Leftward:
    """How real tokens are laid to the left, each in its order.

    Example:
        >>> leftward(torch.tensor([[False, True, True]])).order
        tensor([[1, 2, 0]])
    """
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return Leftward(order, mask.gather(1, order))


def count(tokens: int, block: int) -> int:
    """How many blocks so many tokens make; the last may be short.

    >>> count(9, 4)
    3
    """
    require_at_least(1, block=block)
    return -(-tokens // block)


def windows(
    x: Shaped[Tensor, "batch heads tokens *width"], block: int, fill: float | bool = 0.0
) -> Shaped[Tensor, "batch heads blocks block *width"]:
    """Tokens cut into blocks, the last one filled up."""
    missing = count(x.shape[2], block) * block - x.shape[2]
    if missing:
        x = torch.cat([x, x.new_full((*x.shape[:2], missing, *x.shape[3:]), fill)], 2)
    return x.unflatten(2, (-1, block))


def pooled(
    x: Float[Tensor, "batch heads tokens width"],
    block: int,
    pools: Sequence[Pooling] = ("avg",),
    real: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch heads blocks channels"]:
    """Of each block its largest, smallest and mean channels, one behind the other, over the tokens that it has.

    Args:
        x: tokens.
        block: how many make one.
        pools: in this order.
        real: False on padding, which takes no part.

    Returns:
        Zeros for a block without tokens.

    Example:
        >>> pooled(torch.tensor([[[[1.0], [3.0], [8.0]]]]), 2, ("max", "avg"))
        tensor([[[[3., 2.],
                  [8., 8.]]]])
    """
    require_several(pools=pools)
    for pool in pools:
        require_one_of(get_args(Pooling), pools=pool)
    if real is None:
        real = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    there = windows(real[:, None], block, False)[..., None]
    cut = windows(x, block)
    found = []
    for pool in pools:
        if pool == "avg":
            found.append(cut.masked_fill(~there, 0.0).sum(3) / there.sum(3).clamp(min=1).to(x.dtype))
        else:
            worst = float("-inf") if pool == "max" else float("inf")
            filled = cut.masked_fill(~there, worst)
            found.append(filled.amax(3) if pool == "max" else filled.amin(3))
    return torch.cat(found, -1).masked_fill(~there.any(3), 0.0)


def repeated(x: Shaped[Tensor, "batch kv_heads *rest"], heads: int) -> Shaped[Tensor, "batch heads *rest"]:
    """Keys of grouped queries, once for each query head: query head h reads key head `h // (heads / kv_heads)`.

    Raises:
        InputError: where the heads do not come apart into groups.
    """
    if heads % x.shape[1]:
        raise InputError(f"k: {x.shape[1]} heads of keys cannot be shared by {heads} heads of queries")
    return x if heads == x.shape[1] else x.repeat_interleave(heads // x.shape[1], 1)


def readable(
    chosen: Bool[Tensor, "batch heads queries blocks"],
    block: int,
    keys: int,
    real: Bool[Tensor, "batch keys"] | None = None,
) -> Bool[Tensor, "batch heads queries keys"]:
    """Which keys may be read: those of chosen blocks that are not later than the query; the queries are the last tokens."""
    queries = chosen.shape[2]
    may = chosen.repeat_interleave(block, -1)[..., :keys]
    at = torch.arange(keys, device=chosen.device)
    may = may & (at <= at[keys - queries :, None])
    return may if real is None else may & real[:, None, None]


def masked_attention(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch kv_heads keys width"],
    v: Float[Tensor, "batch kv_heads keys value_width"],
    may: Bool[Tensor, "batch #heads queries keys"],
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Softmax attention over the keys that may be read; zeros for a query that may read none."""
    weights = masked_weights(q, k, may, scale)
    return grouped.mixed(weights.to(v.dtype), v)


def masked_weights(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch kv_heads keys width"],
    may: Bool[Tensor, "batch #heads queries keys"],
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """The weights of the same, at least float32."""
    scores = grouped.products(q, k).to(_wide(q.dtype)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    nothing = ~may.any(-1, keepdim=True)
    return scores.masked_fill(~may & ~nothing, float("-inf")).softmax(-1).masked_fill(nothing, 0.0)


def block_attention(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch kv_heads tokens width"],
    v: Float[Tensor, "batch kv_heads tokens value_width"],
    chosen: Bool[Tensor, "batch heads tokens blocks"],
    block: int,
    real: Bool[Tensor, "batch tokens"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_width"]:
    """Causal attention that reads chosen blocks alone, and computes no other score.

    For one block after the other the queries that chose it are gathered, head by head; their parts are merged by the
    log-sum-exps of their scores, `o = sum_p e^(l_p - m) o_p / sum_p e^(l_p - m)`. Time and memory follow the number of chosen
    (query, block) pairs, never tokens x tokens.

    Args:
        q, k, v: after positions, real tokens on the left.
        chosen: of each query the blocks that it reads; of its own block only what is not later.
        block: tokens of a block.
        real: False on padding.
        scale: of scores, `width^-0.5` by default.

    Returns:
        Zeros for padding, and for a query that chose nothing.
    """
    batch, heads, tokens, width = q.shape
    scale = width**-0.5 if scale is None else scale
    if real is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
    k, v = repeated(k, heads), repeated(v, heads)
    picked = chosen & real[:, None, :, None]
    own = torch.arange(tokens, device=q.device) // block
    # each block reads itself
    queries, keys, values = (windows(x, block) for x in (q, k, v))
    there = windows(real[:, None], block, False)
    ahead = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    first, first_log = _part(queries, keys, values, ahead & there[..., None, :], scale)
    outs = [first.flatten(2, 3)[:, :, :tokens].flatten(0, 2)]
    itself = picked.gather(-1, own.view(1, 1, -1, 1).expand(batch, heads, -1, 1))[..., 0]
    log = first_log.flatten(2, 3)[:, :, :tokens].masked_fill(~itself, float("-inf"))
    logs, index = [log.flatten()], [torch.arange(batch * heads * tokens, device=q.device)]
    past = picked & (torch.arange(chosen.shape[-1], device=q.device) < own[:, None])
    for item, head, number in past.any(2).nonzero().tolist():
        rows = past[item, head, :, number].nonzero()[:, 0]
        span = slice(number * block, (number + 1) * block)
        asked = q[item, head].index_select(0, rows)
        out, log = _part(asked, k[item, head, span], v[item, head, span], real[item, None, span], scale)
        outs.append(out)
        logs.append(log)
        index.append(rows + (item * heads + head) * tokens)
    return _merged(torch.cat(outs), torch.cat(logs), torch.cat(index), batch * heads * tokens).view(
        batch, heads, tokens, -1
    )


def _part(
    q: Float[Tensor, "*batch queries width"],
    k: Float[Tensor, "*batch keys width"],
    v: Float[Tensor, "*batch keys value_width"],
    may: Bool[Tensor, "*_batch _queries keys"],
    scale: float,
) -> tuple[Float[Tensor, "*batch queries value_width"], Float[Tensor, "*batch queries"]]:
    """What some keys give, and the log-sum-exp of their scores, -inf of none."""
    scores = ((q * scale) @ k.mT).to(_wide(q.dtype))
    if bool(may.all()):
        weights = scores.softmax(-1)
        top = scores.amax(-1)
    else:
        nothing = ~may.any(-1, keepdim=True)
        scores = scores.masked_fill_(~(may | nothing), float("-inf"))
        weights, top = scores.softmax(-1), scores.amax(-1).masked_fill(nothing[..., 0], float("-inf"))
    # the largest weight is e^top / sum
    return weights.to(v.dtype) @ v, top - weights.amax(-1).log()


def _merged(
    parts: Float[Tensor, "parts width"], logs: Float[Tensor, "parts"], index: Int[Tensor, "parts"], rows: int
) -> Float[Tensor, "rows width"]:
    """`sum_p e^(l_p - m) o_p / sum_p e^(l_p - m)`, of the parts of each row."""
    top = logs.new_full((rows,), float("-inf")).scatter_reduce(0, index, logs.detach(), "amax")
    top = top.masked_fill(top == float("-inf"), 0.0)
    weight = (logs - top[index]).exp()
    whole = weight.new_zeros(rows).index_add(0, index, weight)
    out = parts.new_zeros(rows, parts.shape[-1]).index_add(0, index, weight.to(parts.dtype)[:, None] * parts)
    return out / whole.masked_fill(whole == 0, 1.0).to(parts.dtype)[:, None]


def pooled_target(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch kv_heads tokens width"],
    block: int,
    real: Bool[Tensor, "batch tokens"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads blocks blocks"]:
    """Of each pair of blocks the largest weight of the causal attention map, rows divided by their sums: what gates learn.

    One block of keys at a time, with running maxima and sums of rows; no tokens x tokens map is made.

    Args:
        q, k: after positions, real tokens on the left.
        block: tokens of a block.
        real: False on padding.
        scale: of scores, `width^-0.5` by default.

    Returns:
        Zeros in rows of blocks that hold padding alone.

    Example:
        >>> q = torch.randn(1, 2, 6, 8)
        >>> bool((pooled_target(q, q, block=2).sum(-1) > 0.999).all())
        True
    """
    tops, log = row_maxima(q, k, block, real, scale)
    rows = windows((tops - log[..., None]).exp(), block).amax(3)
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def row_maxima(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch kv_heads keys width"],
    block: int,
    real: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "batch heads tokens blocks"], Float[Tensor, "batch heads tokens"]]:
    """Of each query its largest score in each block of keys, and the log-sum-exp of all; the queries are the last tokens.

    Returns:
        Largest scores, -inf where a block may not be read; log-sum-exps, 0 of a query that is padding.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = repeated(k, q.shape[1])
    length, before = k.shape[2], k.shape[2] - q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    blocks = count(length, block)
    tops = torch.full((*q.shape[:3], blocks), float("-inf"), dtype=wide, device=q.device)
    top = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    total = torch.zeros(q.shape[:3], dtype=wide, device=q.device)
    at = torch.arange(length, device=q.device)
    for number in range(blocks):
        span = slice(number * block, min((number + 1) * block, length))
        # earlier queries cannot read any of it
        rows = slice(max(0, span.start - before), None)
        scores = (q[:, :, rows] @ keys[:, :, span].mT).to(wide) * scale
        may = at[span] <= at[before:][rows, None]
        if real is not None:
            may = may & real[:, None, None, span] & real[:, None, before:, None][:, :, rows]
        scores = scores.masked_fill(~may, float("-inf"))
        here = scores.amax(-1)
        new = torch.maximum(top[..., rows], here)
        shift = new.masked_fill(new == float("-inf"), 0.0)
        sums = total[..., rows] * (top[..., rows] - shift).exp() + (scores - shift[..., None]).exp().sum(-1)
        tops[..., rows, number], top[..., rows], total[..., rows] = here, new, sums
    nothing = total == 0
    log = top.masked_fill(nothing, 0.0) + total.masked_fill(nothing, 1.0).log()
    return tops, log


def top_blocks(
    scores: Float[Tensor, "batch heads queries blocks"], keep: int | Int[Tensor, "batch"]
) -> Bool[Tensor, "batch heads queries blocks"]:
    """The highest scores of each query; of equal ones the first.

    Args:
        scores: of blocks.
        keep: how many, of each item.
    """
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < (keep if isinstance(keep, int) else keep.view(-1, 1, 1, 1))


def own_block(queries: int, block: int, device: torch.device | None = None) -> Int[Tensor, "queries"]:
    """The block of each token."""
    return torch.arange(queries, device=device) // block


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Bool[Tensor, "batch tokens"]]:
    """Sequences `[tokens, heads, width]` of several lengths as `[batch, heads, tokens, width]`, and where they are real."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    together = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).transpose(1, 2)
    at = torch.arange(together.shape[2])
    return together, (at < lengths[:, None]).to(together.device)
