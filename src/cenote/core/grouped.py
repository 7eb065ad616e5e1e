"""Attention of few queries with grouped keys, exact: the queries that share a key head are rows of one product, and keys are
never repeated."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from cenote.core.errors import InputError


def as_rows(q: Float[Tensor, "batch heads queries width"], kv_heads: int) -> Float[Tensor, "batch kv_heads rows width"]:
    """Heads `h // (heads / kv_heads)` read the same keys: their queries, one head behind the other.

    Raises:
        InputError: where heads are no multiple of those of the keys.
    """
    batch, heads, queries, width = q.shape
    if heads % kv_heads:
        raise InputError(f"q: expected a multiple of the {kv_heads} heads of the keys, got {heads} heads")
    return q.reshape(batch, kv_heads, heads // kv_heads * queries, width)


def as_heads(y: Float[Tensor, "batch kv_heads rows width"], heads: int) -> Float[Tensor, "batch heads queries width"]:
    """The way back."""
    return y.reshape(y.shape[0], heads, -1, y.shape[3])


def products(
    q: Float[Tensor, "batch heads queries width"], k: Float[Tensor, "batch kv_heads keys width"]
) -> Float[Tensor, "batch heads queries keys"]:
    """`q k'` of each head with its keys."""
    # a product of four dimensions is taken apart first, which costs as much again for a single query
    scores = torch.bmm(as_rows(q, k.shape[1]).flatten(0, 1), k.flatten(0, 1).mT)
    return as_heads(scores.view(*k.shape[:2], -1, k.shape[2]), q.shape[1])


def mixed(
    weights: Float[Tensor, "batch heads queries keys"], v: Float[Tensor, "batch kv_heads keys value_width"]
) -> Float[Tensor, "batch heads queries value_width"]:
    """What these weights make of the values."""
    y = torch.bmm(as_rows(weights, v.shape[1]).flatten(0, 1), v.flatten(0, 1))
    return as_heads(y.view(*v.shape[:2], -1, v.shape[3]), weights.shape[1])


def attend(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch kv_heads keys width"],
    v: Float[Tensor, "batch kv_heads keys value_width"],
    scale: float | None = None,
    *,
    readable: Bool[Tensor, "_batch _heads _queries keys"] | None = None,
    bias: Float[Tensor, "_batch _heads _queries keys"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, "heads"] | None = None,
) -> Float[Tensor, "batch heads queries value_width"]:
    """`softmax(cap(scale q k') + bias, where readable) v`, the same as with repeated keys to rounding.

    Args:
        q: queries.
        k, v: keys and values of each key head.
        scale: of the products, `1 / sqrt(width)` by default.
        readable: which keys each query may read, of one head for all, of key heads, or of heads; None for all.
        bias: added to the scores, of as many.
        softcap: scores become `softcap tanh(scores / softcap)`, before the bias.
        sinks: a score of each head that takes part in the softmax and has no value.

    Returns:
        Zeros for a query that may read nothing.

    Example:
        >>> q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
        >>> repeated = k.repeat_interleave(2, 1)
        >>> bool(torch.allclose(attend(q, k, k), F.scaled_dot_product_attention(q, repeated, repeated), atol=1e-6))
        True
    """
    heads, queries, kv_heads = q.shape[1], q.shape[2], k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    may = None if readable is None else _rows_of(readable, heads, kv_heads, queries)
    more = None if bias is None else _rows_of(bias, heads, kv_heads, queries)
    nothing = None if may is None else ~may.any(-1, keepdim=True)
    if softcap is None and sinks is None:
        mask: Tensor | None = more
        if may is not None and nothing is not None:
            mask = may | nothing
            mask = mask if more is None else torch.where(mask, more.to(q.dtype), float("-inf"))
        y = F.scaled_dot_product_attention(as_rows(q, kv_heads), k, v, attn_mask=mask, scale=scale)
    else:
        scores = as_rows(q, kv_heads) @ k.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if more is not None:
            scores = scores + more
        if may is not None and nothing is not None:
            scores = scores.masked_fill(~(may | nothing), float("-inf"))
        y = _softmax(scores, sinks, queries).to(v.dtype) @ v
    if nothing is not None:
        y = y.masked_fill(nothing, 0.0)
    return as_heads(y, heads)


def gathered(
    x: Float[Tensor, "batch kv_heads keys width"], numbers: Int[Tensor, "batch heads chosen"]
) -> Float[Tensor, "batch heads chosen width"]:
    """The keys of these numbers: of each key head, or of each query head, of a group from the same keys.

    Example:
        >>> gathered(torch.arange(3.0).view(1, 1, 3, 1), torch.tensor([[[2, 0]]])).flatten().tolist()
        [2.0, 0.0]
    """
    batch, kv_heads, _, width = x.shape
    group = numbers.shape[1] // kv_heads
    if batch * numbers.shape[1] <= 64:
        # rows copied whole: several times as fast as to gather numbers one by one
        rows = [
            x[item, head // group].index_select(0, numbers[item, head])
            for item in range(batch)
            for head in range(numbers.shape[1])
        ]
        return torch.stack(rows).view(batch, -1, numbers.shape[2], width)
    x = x if group == 1 else x.repeat_interleave(group, 1)
    return x.gather(2, numbers.unsqueeze(-1).expand(-1, -1, -1, width))


def _rows_of(mask: Tensor, heads: int, kv_heads: int, queries: int) -> Tensor:
    """A mask or a bias as rows see it, `[batch or 1, kv_heads or 1, rows or 1, keys]`."""
    group = heads // kv_heads
    if mask.shape[1] == heads and group > 1:
        return mask.expand(-1, -1, queries, -1).reshape(mask.shape[0], kv_heads, group * queries, mask.shape[3])
    if mask.shape[1] not in (1, kv_heads):
        raise InputError(f"readable, bias: expected 1, {kv_heads} or {heads} heads, got {mask.shape[1]}")
    return mask if mask.shape[2] == 1 else mask.repeat(1, 1, group, 1)


def _softmax(
    scores: Float[Tensor, "batch kv_heads rows keys"], sinks: Tensor | None, queries: int
) -> Float[Tensor, "batch kv_heads rows keys"]:
    if sinks is None:
        return scores.softmax(-1)
    beside = sinks.to(scores.dtype).repeat_interleave(queries).view(1, scores.shape[1], -1, 1)
    return torch.cat([scores, beside.expand(len(scores), -1, -1, -1)], -1).softmax(-1)[..., :-1]
