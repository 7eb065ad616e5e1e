import torch
from torch import nn

from cenote.core.attention import Plan, cross_attention
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.base import Pooled, QueryPool


class MHCAPool(QueryPool):
    """Plain multi-head cross-attention from learned queries: the attentive probe that others are measured against.

    `y_j = W_o [sum_n a_jn (W_v x_n + b_v)] + b_o`, `a_j = softmax_n((W_q q_j + b_q) . W_k x_n / sqrt(dim/heads))` per head.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 8, or the largest divisor below it.
        queries: number of learned queries; more than one gives `[batch, queries, dim]`.
        bias: whether queries, values and the output have biases.
        plan: see `cenote.core.cross_attention`.

    Example:
        >>> MHCAPool(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: Vaswani et al., "Attention Is All You Need", 2017; as a probe: Psomas et al., "Attention, Please!", 2025.

    Note:
        The key bias, which drops out of the softmax, is left out.
    """

    def __init__(
        self, dim: int, heads: int | None = None, queries: int = 1, bias: bool = True, plan: Plan = "auto"
    ) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 8) if heads is None else heads
        require_divides("heads", self.heads, dim)
        self.vectors = queries
        self.plan = plan
        self.query = nn.Parameter(0.02 * torch.randn(1, queries, dim))
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        output, weights = cross_attention(
            tokens,
            self.q(self.query[0]),
            key=self.k,
            value=self.v,
            heads=self.heads,
            plan=self.plan,
            need_weights=need_weights,
        )
        y = self.proj(output)
        return Pooled(y if self.vectors > 1 else y.squeeze(1), weights)
