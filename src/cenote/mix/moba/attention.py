"""Attention to the blocks whose mean keys answer a query best.

Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025), arXiv 2502.13189, NeurIPS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.mix.blocks import (
    block_attention,
    leftward,
    masked_attention,
    own_block,
    padded,
    pooled,
    readable,
    repeated,
    windows,
)


class Routed(NamedTuple):
    """Which blocks each query reads.

    Attributes:
        chosen: `[batch, heads, tokens, blocks]`; none of a later block, none for padding.
        scores: by which they were chosen: inf of the own block, -inf of later ones.
    """

    chosen: Bool[Tensor, "batch heads tokens blocks"]
    scores: Float[Tensor, "batch heads tokens blocks"]


@torch.no_grad()
def route(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch kv_heads tokens width"],
    block: int,
    top: int,
    real: Bool[Tensor, "batch tokens"] | None = None,
    *,
    first: int = 0,
    last: int = 0,
) -> Routed:
    """Of each query its own block, and the past ones whose mean key has the largest product with it, `top` in all.

    `s_ij = q_i . mean_(t in block j) k_t`, without a scale. The mean of the own block holds later keys and is not looked at.
    No gradient passes through the choice.

    Args:
        q, k: after positions, real tokens on the left; keys of grouped queries not repeated.
        block: tokens of a block, the last may be short.
        top: blocks that a query reads, its own included.
        real: False on padding.
        first, last: so many first blocks, and so many before its own, are always among them (inferred): sinks, a window.

    Raises:
        InputError: where more blocks are always taken than `top`.

    Example:
        >>> q = torch.randn(1, 2, 12, 8)
        >>> route(q, q, block=4, top=2).chosen[0, 0, :, 0].tolist()[:8]
        [True, True, True, True, True, True, True, True]
    """
    require_at_least(1, block=block, top=top)
    require_at_least(0, first=first, last=last)
    if first + last + 1 > top:
        raise InputError(
            f"top: {top} blocks, and {first} first, {last} last and the own one are always taken; raise top"
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    means = pooled(k.to(wide), block, ("avg",), real)
    scores = q.to(wide) @ repeated(means, q.shape[1]).mT
    own = own_block(q.shape[2], block, q.device)[:, None]
    blocks = torch.arange(scores.shape[-1], device=q.device)
    always = (blocks == own) | (blocks < first) | (blocks >= own - last)
    later = blocks > own
    scores = scores.masked_fill(always, float("inf")).masked_fill(later, float("-inf"))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(min(top, scores.shape[-1]), -1).indices, True)
    chosen &= ~later
    if real is not None:
        chosen &= real[:, None, :, None] & windows(real[:, None], block, False).any(-1)[:, :, None]
    return Routed(chosen, scores)


def moba_attention(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch kv_heads tokens width"],
    v: Float[Tensor, "batch kv_heads tokens value_width"],
    block: int,
    top: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    gathered: bool = True,
    first: int = 0,
    last: int = 0,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_width"]:
    """`o_i = softmax(q_i . k_t / sqrt(width))`, over the keys t <= i of the blocks that `route` chose, times values.

    Args:
        q, k, v: after positions; keys and values of grouped queries not repeated.
        block, top, first, last: as of `route`.
        mask: False on padding, on either side.
        gathered: compute the scores of chosen blocks alone; else all of them, masked. The results are the same.
        scale: of scores.

    Returns:
        Zeros for padding.

    Example:
        >>> q = torch.randn(1, 2, 9, 8)
        >>> torch.allclose(
        ...     moba_attention(q, q, q, block=4, top=3),
        ...     torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
        ...     atol=1e-6,
        ... )
        True

    Note:
        With `top=1` a query reads its own block alone, as the authors' plain code does; their fast code reads everything then.
    """
    laid = None
    if mask is not None:
        laid = leftward(mask)
        q, k, v = (laid.laid(x) for x in (q, k, v))
    real = None if laid is None else laid.real
    chosen = route(q, k, block, top, real, first=first, last=last).chosen
    if gathered:
        y = block_attention(q, k, v, chosen, block, real, scale)
    else:
        y = masked_attention(q, k, v, readable(chosen, block, k.shape[2], real), scale)
    return y if laid is None else laid.back(y)


def moba_attention_packed(
    q: Float[Tensor, "tokens heads width"],
    k: Float[Tensor, "tokens kv_heads width"],
    v: Float[Tensor, "tokens kv_heads value_width"],
    offsets: Int[Tensor, "sequences_plus_1"],
    block: int,
    top: int,
    *,
    gathered: bool = True,
    first: int = 0,
    last: int = 0,
) -> Float[Tensor, "tokens heads value_width"]:
    """The same of sequences that lie one behind the other, without padding.

    Args:
        q, k, v: all sequences.
        offsets: where each begins, and where the last ends.
        block, top, gathered, first, last: as of `moba_attention`.

    Raises:
        InputError: where the offsets do not cover the tokens.
    """
    lengths = offsets.diff().tolist()
    if offsets[0] != 0 or sum(lengths) != len(q) or min(lengths, default=0) < 0:
        raise InputError(f"offsets: expected to rise from 0 to {len(q)}, got {offsets.tolist()}")
    (queries, mask), (keys, _), (values, _) = (padded(x.split(lengths)) for x in (q, k, v))
    y = moba_attention(queries, keys, values, block, top, mask, gathered=gathered, first=first, last=last)
    return y.transpose(1, 2)[mask]
