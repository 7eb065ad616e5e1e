import torch
from torch import nn

from cenote.core.attention import cross_attention
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.attention.blocks import MLP, split_projection
from cenote.pool.base import Pooled, QueryPool


class SigLipPool(QueryPool):
    """SigLIP's attention pooling (`AttentionPoolLatent`): a learned latent attends to the tokens, then an MLP.

    `l = W_o [sum_n a_n (W_v x_n + b_v)] + b_o`, `a = softmax_n((W_q latent + b_q) . W_k x_n / sqrt(dim/heads))` per head;
    `y = l + MLP(l)`, or with `norm` `y = l + MLP(LN(l))`.

    Parameters carry the names of timm's `AttentionPoolLatent`, so that its weights load.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 8, or the largest divisor below it.
        queries: number of latents; more than one gives `[batch, queries, dim]`.
        average: whether several latents are averaged to one vector.
        mlp_ratio: hidden width of the MLP by `dim`.
        qkv_bias: whether queries, keys and values have biases.
        norm: whether a LayerNorm stands before the MLP.
        qk_norm: whether queries and keys are layer-normalised per head; the tokens must then be projected.

    Example:
        >>> SigLipPool(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023; this form: Psomas et al., "Attention,
    Please!", 2025.

    Note:
        The authors' class computes every latent and returns the first; here the others need not exist. The bias of the
        keys' LayerNorm, which drops out of the softmax, is left out.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        queries: int = 1,
        average: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 8) if heads is None else heads
        require_divides("heads", self.heads, dim)
        self.average = average
        self.vectors = 1 if average else queries
        self.latent = nn.Parameter(torch.empty(1, queries, dim))
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // self.heads) if qk_norm else None
        self.k_norm = nn.LayerNorm(dim // self.heads, bias=False) if qk_norm else None
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:
        query = self.q(self.latent[0])
        if self.q_norm is not None:
            query = self.q_norm(query.unflatten(-1, (self.heads, -1))).flatten(-2)
        key, value = split_projection(self.kv, 2)
        latent, weights = cross_attention(
            tokens, query, key=key, value=value, heads=self.heads, head_norm=self.k_norm, need_weights=need_weights
        )
        latent = self.proj(latent)
        y = latent + self.mlp(self.norm(latent))
        return Pooled(y.mean(1) if self.average else y if self.vectors > 1 else y.squeeze(1), weights)
