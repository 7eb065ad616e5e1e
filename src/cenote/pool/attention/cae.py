import torch
from torch import nn

from cenote.core.attention import cross_attention
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.base import Pooled, QueryPool


class CaePool(QueryPool):
    """CAE's attentive probe: one learned query, with a LayerNorm of its own for query, keys and values.

    `y = W_o [sum_n a_n W_v LN_v(x_n)] + b_o`, `a = softmax_n(W_q LN_q(query) . W_k LN_k(x_n) / sqrt(head_dim))` per head.

    Args:
        dim: width of a token.
        heads: Default 8, or the largest divisor of `dim` below it.
        head_dim: width of a head; default `dim // heads`, and `heads` must then divide `dim`.
        qkv_bias: whether queries and values have biases.

    Example:
        >>> CaePool(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", 2022; this form: Psomas et al.,
    "Attention, Please!", 2025.

    Note:
        The authors' class holds a fourth LayerNorm that it never uses; it is left out, as is the bias of the keys' LayerNorm,
        which drops out of the softmax.
    """

    def __init__(self, dim: int, heads: int | None = None, head_dim: int | None = None, qkv_bias: bool = False) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 8) if heads is None else heads
        if head_dim is None:
            require_divides("heads", self.heads, dim)
            head_dim = dim // self.heads
        width = self.heads * head_dim
        self.query_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm1_q = nn.LayerNorm(dim)
        self.norm1_k = nn.LayerNorm(dim, bias=False)
        self.norm1_v = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, width, bias=qkv_bias)
        self.k = nn.Linear(dim, width, bias=False)
        self.v = nn.Linear(dim, width, bias=qkv_bias)
        self.proj = nn.Linear(width, dim)
        if qkv_bias:
            nn.init.zeros_(self.q.bias)
            nn.init.zeros_(self.v.bias)

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        output, weights = cross_attention(
            tokens,
            self.q(self.norm1_q(self.query_token[0])),
            key=self.k,
            value=self.v,
            heads=self.heads,
            key_norm=self.norm1_k,
            value_norm=self.norm1_v,
            need_weights=need_weights,
        )
        return Pooled(self.proj(output).squeeze(1), weights)
