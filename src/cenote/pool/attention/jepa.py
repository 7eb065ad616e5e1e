import math

import torch
from torch import nn

from cenote.core.attention import cross_attention
from cenote.core.requirements import require_at_least
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.attention.blocks import MLP, TransformerBlock, split_projection
from cenote.pool.base import Pooled, QueryPool


class JepaPool(QueryPool):
    """V-JEPA's attentive pooling: learned queries and a cross-attention block.

    `q <- q + W_o [sum_n a_n (W_v z_n + b_v)] + b_o`, `z_n = LN(x_n)`,
    `a = softmax_n((W_q q + b_q) . W_k z_n / sqrt(dim/heads))` per head; `q <- q + MLP(LN(q))`; `y = q`. With `depth > 1`,
    `depth - 1` self-attention blocks among the queries follow. Without `complete_block`,
    `y = W_o [sum_n a_n (W_v x_n + b_v)] + b_o` alone.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 16, or the largest divisor below it.
        queries: number of learned queries; more than one gives `[batch, queries, dim]`.
        depth: number of blocks, the cross-attention included.
        mlp_ratio: hidden width of the MLP by `dim`.
        qkv_bias: whether queries, keys and values have biases.
        complete_block: whether norms, residuals and the MLP are there.

    Example:
        >>> JepaPool(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from Video", 2024; this form:
    Psomas et al., "Attention, Please!", 2025.

    Note:
        16 heads are the default of the authors' training script; their class itself defaults to 12.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        queries: int = 1,
        depth: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        complete_block: bool = True,
    ) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 16) if heads is None else heads
        require_divides("heads", self.heads, dim)
        require_at_least(1, depth=depth)
        self.vectors = queries
        self.complete_block = complete_block
        self.query_tokens = nn.Parameter(torch.zeros(1, queries, dim))
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim) if complete_block else None
        self.norm2 = nn.LayerNorm(dim) if complete_block else None
        self.mlp = MLP(dim, int(dim * mlp_ratio)) if complete_block else None
        self.blocks = nn.ModuleList(
            TransformerBlock.of_vit(dim, self.heads, mlp_ratio, qkv_bias) for _ in range(depth - 1)
        )
        self._initialise()

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        query = self.query_tokens[0]
        key, value = split_projection(self.kv, 2)
        attended, weights = cross_attention(
            tokens,
            self.q(query),
            key=key,
            value=value,
            heads=self.heads,
            key_norm=self.norm1,
            value_norm=self.norm1,
            need_weights=need_weights,
        )
        y = self.proj(attended)
        if self.mlp is not None and self.norm2 is not None:
            y = query + y
            y = y + self.mlp(self.norm2(y))
        for block in self.blocks:
            y = block(y)
        return Pooled(y if self.vectors > 1 else y.squeeze(1), weights)

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.query_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        blocks = [block for block in self.blocks if isinstance(block, TransformerBlock)]
        last = [[self.proj] if self.mlp is None else [self.proj, self.mlp.fc2]]
        last += [[block.attn.proj, block.mlp.fc2] for block in blocks]
        with torch.no_grad():
            for depth, maps in enumerate(last, 1):
                for linear in maps:
                    linear.weight.div_(math.sqrt(2 * depth))
