import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.attention import Latents, cross_attention
from cenote.core.requirements import require_at_least
from cenote.core.sets import Tokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.attention.blocks import MLP
from cenote.pool.base import Pool, Pooled


class CaiTPool(Pool):
    """Class attention: a learned [CLS] reads itself and the tokens, block by block, while the tokens stay as they are.

    A block, with `z = LN([c; x])`:
    `c <- c + g_1 * (W_o [sum_n a_n (W_v z_n + b_v)] + b_o)`, `a = softmax_n((W_q z_0 + b_q) . W_k z_n / sqrt(dim/heads))`
    per head; `c <- c + g_2 * MLP(LN(c))`. At the end `y = LN(c)`.

    [CLS] stands among its own keys. It is not concatenated to the tokens: its score joins the softmax through the logsumexp
    of theirs (`beside` in `cenote.core.cross_attention`), so the tokens are neither copied nor projected. The weights are
    those of the last block on the `N` tokens; what is missing to 1 fell on [CLS] itself.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 4, or the largest divisor below it.
        depth: number of class-attention blocks.
        mlp_ratio: hidden width of the MLP by `dim`.
        qkv_bias: whether queries and values have biases.
        init_scale: first value of the LayerScales `g_1`, `g_2`.

    Example:
        >>> CaiTPool(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: Touvron et al., "Going deeper with Image Transformers", ICCV 2021; this form: Psomas et al., "Attention,
    Please!", 2025.

    Note:
        The key bias of the authors' `qkv_bias`, which drops out of the softmax, is left out. With the first LayerScale of
        1e-5 an untrained pool gives almost the same vector for every set.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        depth: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_scale: float = 1e-5,
    ) -> None:
        super().__init__(dim)
        heads = largest_divisor(dim, 4) if heads is None else heads
        require_divides("heads", heads, dim)
        require_at_least(1, depth=depth)
        self.heads = heads
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(
            ClassAttentionBlock(dim, heads, mlp_ratio, qkv_bias, init_scale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def pool(self, tokens: Tokens) -> Pooled:
        cls = self.cls_token[0]
        weights: Tensor | None = None
        for block in self.blocks:
            cls, weights = block(tokens, cls)
        return Pooled(self.norm(cls).squeeze(1), weights)


class ClassAttentionBlock(nn.Module):
    """One block of `CaiTPool`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, init_scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(init_scale * torch.ones(dim))
        self.gamma_2 = nn.Parameter(init_scale * torch.ones(dim))

    def forward(self, tokens: Tokens, cls: Float[Tensor, "1 dim"] | Float[Tensor, "batch 1 dim"]) -> Latents:
        """The new [CLS] `[batch, 1, dim]`, and its weights on the tokens. The first [CLS] is the same for all sets."""
        attended, weights = cross_attention(
            tokens,
            self.q(self.norm1(cls)),
            key=self.k,
            value=self.v,
            heads=self.heads,
            key_norm=self.norm1,
            value_norm=self.norm1,
            beside=cls.expand(tokens.batch, 1, -1),
        )
        cls = cls + self.gamma_1 * self.proj(attended)
        return Latents(cls + self.gamma_2 * self.mlp(self.norm2(cls)), weights)
