"""NV-Embed's latent attention: the tokens ask, and learned latents answer.

Source: Lee et al., "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", ICLR 2025.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.requirements import require_at_least
from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled


class LatentAttention(Pool):
    """Every token looks itself up among learned latents; then the mean of the tokens.

    `A_n = W_o attention(W_q LN(x_n), W_k LN(Z), W_v LN(Z)) + x_n`, `A <- A + W_2 (u * gelu(g)) + b_2` with
    `[u; g] = W_1 LN(A) + b_1`, `y = mean_n A_n / ||mean_n A_n||`: as `TrainableLatents` with both sides exchanged.

    Args:
        dim: width of a token.
        latents: number of latents.
        heads: number of heads.
        head_dim: width of a head; default `dim`, as theirs of 4096.

    Example:
        >>> LatentAttention(16, latents=8, heads=2, head_dim=4)(torch.randn(2, 5, 16)).norm(dim=-1).allclose(torch.ones(2))
        True

    Source: Lee et al., "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", ICLR 2025; as a rival
    in Tang, Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024.

    Note:
        The weights are those of the mean, the same for all tokens: what a token looks up does not depend on the others.
    """

    def __init__(self, dim: int, latents: int = 512, heads: int = 8, head_dim: int | None = None) -> None:
        super().__init__(dim)
        head_dim = dim if head_dim is None else head_dim
        require_at_least(1, latents=latents, heads=heads, head_dim=head_dim)
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.norm = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)
        self.ff_norm = nn.LayerNorm(dim)
        self.ff_in = nn.Linear(dim, 8 * dim)
        self.ff_out = nn.Linear(4 * dim, dim)

    def pool(self, tokens: Tokens) -> Pooled:
        mean = tokens.mean(self.looked_up(tokens.values))
        return Pooled(F.normalize(mean, dim=-1), tokens.uniform())

    def looked_up(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """Each token after its look-up, `A_n`."""
        rows = x.flatten(0, -2)
        sides = self.to_kv(self.norm_latents(self.latents)).chunk(2, -1)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in sides)
        q = self.to_q(self.norm(rows)).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        found = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        a = self.to_out(found) + rows
        u, gate = self.ff_in(self.ff_norm(a)).chunk(2, -1)
        return (a + self.ff_out(u * F.gelu(gate))).unflatten(0, x.shape[:-1])
