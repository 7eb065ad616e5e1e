import torch
from torch import nn

from cenote.core.attention import Plan, cross_attention
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.base import Pooled, QueryPool


class EfficientProbing(QueryPool):
    """Several learned queries attend to the raw tokens; each fills its own slice of one value projection.

    `a_j = softmax_n(q_j . x_n / sqrt(dim))`, `y_j = W_v[slice j] (sum_n a_jn x_n)`, `y = [y_1; ...; y_Q]`.

    Args:
        dim: width of a token.
        queries: `Q`; divides `dim // d_out`. Default 32, or the largest divisor below it.
        d_out: the output has width `dim // d_out`; divides `dim`.
        plan: `"absorbed"` maps the pooled values, `"projected"` every token; see `cenote.core.cross_attention`.

    Example:
        >>> pool = EfficientProbing(64, queries=4)
        >>> pool(torch.randn(2, 9, 64)).shape
        torch.Size([2, 64])

    Source: Psomas et al., "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling", 2025.
    """

    def __init__(self, dim: int, queries: int | None = None, d_out: int = 1, plan: Plan = "auto") -> None:
        require_divides("d_out", d_out, dim)
        super().__init__(dim, dim // d_out)
        self.queries = largest_divisor(self.out_dim, 32) if queries is None else queries
        require_divides("queries", self.queries, self.out_dim)
        self.plan = plan
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, self.queries, dim))
        self.v = nn.Linear(dim, self.out_dim, bias=False)

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        output, weights = cross_attention(
            tokens,
            self.cls_token.flatten(1),
            value=self.v,
            heads=self.queries,
            scale=self.dim**-0.5,
            plan=self.plan,
            need_weights=need_weights,
        )
        return Pooled(output.squeeze(1), weights)
