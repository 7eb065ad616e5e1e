import torch
import torch.nn.functional as F
from torch import nn

from cenote.core.attention import cross_attention
from cenote.core.requirements import require_at_least
from cenote.core.sets import Tokens
from cenote.pool.attention.blocks import split_projection
from cenote.pool.base import Pooled, QueryPool


class CoCaPool(QueryPool):
    """CoCa's attention pooling: query heads that share a single head of keys and values.

    `q_h = W_q[head h] LN(query)`, `a_h = softmax_n(q_h . W_k x_n / sqrt(head_dim))`,
    `y = W_o [sum_n a_1n W_v x_n; ...; sum_n a_Hn W_v x_n]`; with `feedforward` also `+ W_2 (silu(g) * u)`,
    `[u; g] = W_1 LN(query)`. No biases.

    Args:
        dim: width of a token.
        out_dim: width of query and output; default `dim`.
        heads: number of query heads.
        head_dim: width of a head.
        queries: number of learned queries; more than one gives `[batch, queries, out_dim]`.
        norm_tokens: whether the tokens are layer-normalised.
        feedforward: hidden width of the parallel feed-forward by `out_dim`; `None`: there is none.

    Example:
        >>> CoCaPool(16, head_dim=8)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models", 2022; this form: Psomas et al.,
    "Attention, Please!", 2025.

    Note:
        The authors keep 196 learned queries and return the answer to the first; the other 195 change nothing and are not
        kept here.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        heads: int = 8,
        head_dim: int = 64,
        queries: int = 1,
        norm_tokens: bool = False,
        feedforward: float | None = None,
    ) -> None:
        super().__init__(dim, out_dim)
        require_at_least(1, heads=heads, head_dim=head_dim, queries=queries)
        self.heads = heads
        self.vectors = queries
        self.img_queries = nn.Parameter(torch.randn(queries, self.out_dim))
        self.norm = nn.LayerNorm(self.out_dim, bias=False)
        self.context_norm = nn.LayerNorm(dim, bias=False) if norm_tokens else None
        self.to_q = nn.Linear(self.out_dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, self.out_dim, bias=False)
        hidden = int((feedforward or 0) * self.out_dim)
        self.ff_in = nn.Linear(self.out_dim, 2 * hidden, bias=False) if hidden else None
        self.ff_out = nn.Linear(hidden, self.out_dim, bias=False) if hidden else None

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        query = self.norm(self.img_queries)
        key, value = split_projection(self.to_kv, 2)
        # one head of keys and values: the query heads are queries of that head
        by_head = self.to_q(query).unflatten(-1, (self.heads, -1)).transpose(0, 1).flatten(0, 1)
        answers, weights = cross_attention(
            tokens,
            by_head,
            key=key,
            value=value,
            key_norm=self.context_norm,
            value_norm=self.context_norm,
            need_weights=need_weights,
        )
        y = self.to_out(answers.unflatten(1, (self.heads, -1)).transpose(1, 2).flatten(2))
        if self.ff_in is not None and self.ff_out is not None:
            u, gate = self.ff_in(query).chunk(2, -1)
            y = y + self.ff_out(F.silu(gate) * u)
        return Pooled(y if self.vectors > 1 else y.squeeze(1), weights)
