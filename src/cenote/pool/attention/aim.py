import torch
from torch import nn

from cenote.core.attention import Projection, cross_attention
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.attention.blocks import TokenBatchNorm
from cenote.pool.base import Pooled, QueryPool


class AimPool(QueryPool):
    """Learned queries attend to batch-normalised tokens; several queries are averaged.

    `z_n = BatchNorm(x_n)` without affine part, `a_j = softmax_n(q_j . W_k z_n / sqrt(dim/heads))` per head,
    `y = mean_j sum_n a_jn W_v z_n`.

    The BatchNorm is the same affine map for every token, so it moves into `W_k` and `W_v` and no token is normalised or
    projected: in eval mode with the running statistics, while training with those of the batch.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 16, or the largest divisor below it.
        queries: number of learned queries.
        qkv_bias: whether `W_v` has a bias.

    Example:
        >>> AimPool(48)(torch.randn(2, 9, 48)).shape
        torch.Size([2, 48])

    Source: El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models", 2024; this form: Psomas et al.,
    "Attention, Please!", 2025.

    Note:
        The key bias of the authors' `qkv_bias`, which drops out of the softmax, is left out. Half-precision tokens are
        normalised one by one: a channel with a large mean would cancel badly after the sum. 16 heads are the default of the
        authors' training script; their class itself defaults to 12.
    """

    def __init__(self, dim: int, heads: int | None = None, queries: int = 1, qkv_bias: bool = False) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 16) if heads is None else heads
        require_divides("heads", self.heads, dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, queries, dim))
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.bn = TokenBatchNorm(dim, eps=1e-6, affine=False)

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        key, value = Projection(self.k.weight), Projection(self.v.weight, self.v.bias)
        if accumulation_dtype(tokens.values.dtype) == tokens.values.dtype:
            mean, inverse_std = self.bn.moments(tokens, tokens.values)
            key = Projection(self.k.weight * inverse_std)
            weight = self.v.weight * inverse_std
            bias = -(weight @ mean)
            value = Projection(weight, bias if self.v.bias is None else bias + self.v.bias)
        else:
            tokens = tokens.replace(self.bn.normalised(tokens, tokens.values))
        output, weights = cross_attention(
            tokens, self.cls_token[0], key=key, value=value, heads=self.heads, need_weights=need_weights
        )
        return Pooled(output.mean(1), weights)
