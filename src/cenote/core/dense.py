"""Attention between projected vectors, every query against every key, through PyTorch's fused kernel."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError


def dense_attention(
    query: Float[Tensor, "batch queries width"],
    key: Float[Tensor, "batch keys width"],
    value: Float[Tensor, "batch keys value_width"],
    heads: int = 1,
    scale: float | None = None,
    mask: Bool[Tensor, "batch keys"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch queries value_width"]:
    """`y_h = softmax(scale q_h k_h^T) v_h` on each head's slice of the channels, the heads side by side.

    Args:
        query, key, value: projected vectors, heads side by side.
        heads: divides both widths.
        scale: factor on the scores; default `head_width ** -0.5`.
        mask: True on real keys; where a set has none, the result is zero.
        dropout: probability with which a weight is dropped.

    Raises:
        InputError: where the heads do not divide the widths.
    """
    for name, size in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if heads < 1 or size % heads:
            raise InputError(f"heads: {heads} does not divide the {name} width {size}")
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        return y.transpose(1, 2).flatten(2)
    empty = ~mask.any(1, keepdim=True)
    # an empty set keeps its slots, so that no kernel meets a row of nothing but -inf
    seen = (mask | empty)[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scale)
    return y.transpose(1, 2).flatten(2).masked_fill(empty.unsqueeze(-1), 0)
