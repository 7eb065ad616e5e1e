import torch
from torch import nn

from cenote.core.attention import cross_attention
from cenote.core.sets import PaddedTokens
from cenote.core.widths import largest_divisor, require_divides
from cenote.pool.attention.blocks import project, require_tokens, split_projection
from cenote.pool.base import PaddedPool, Pooled


class ClipPool(PaddedPool):
    """CLIP's attention pooling (`AttentionPool2d`): the mean token asks, the mean and all tokens answer, with positions.

    `z_n = LN(x_n)`, `z_0 = mean_n z_n`, `t_n = z_n + p_n` for `n = 0..N`,
    `y = W_o (sum_n a_n W_v t_n) + b_o`, `a = softmax_n(W_q t_0 . W_k t_n / sqrt(width/heads))` per head.

    Only the answer to the mean token is returned, so it alone asks and nothing quadratic is computed. The weights are those
    of the `N` tokens; what is missing to 1 fell on the mean token.

    Args:
        dim: width of a token.
        tokens: number of patches, each with its own learned position.
        heads: divides `width`. Default 4, or the largest divisor below it.
        out_dim: width of the output; default `dim`.
        width: of queries, keys and values; default `dim`.
        qkv_bias: whether queries, keys and values have biases.

    Raises:
        InputError: when called with another number of tokens.

    Example:
        >>> output, weights = ClipPool(16, tokens=9).attend(torch.randn(2, 9, 16))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 4, 9]))

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021; this form with a
    LayerNorm in front: Psomas et al., "Attention, Please!", 2025.
    """

    permutation_invariant = False
    fixed_tokens = True

    def __init__(
        self,
        dim: int,
        tokens: int,
        heads: int | None = None,
        out_dim: int | None = None,
        width: int | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, out_dim)
        width = dim if width is None else width
        self.tokens = tokens
        self.heads = largest_divisor(width, 4) if heads is None else heads
        require_divides("heads", self.heads, width)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.empty(tokens + 1, dim))
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, self.out_dim)
        nn.init.trunc_normal_(self.pos_embed, std=dim**-0.5)
        nn.init.trunc_normal_(self.qkv.weight, std=dim**-0.5)
        if qkv_bias:
            nn.init.zeros_(self.qkv.bias)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        require_tokens(tokens, self.tokens)
        z = self.norm(tokens.values)
        t = torch.cat([tokens.mean(z).unsqueeze(1), z], 1) + self.pos_embed
        mask = None if tokens.mask is None else torch.nn.functional.pad(tokens.mask, (1, 0), value=True)
        query, key, value = split_projection(self.qkv, 3)
        output, weights = cross_attention(
            PaddedTokens(t, mask), project(t[:, :1], query), key=key, value=value, heads=self.heads
        )
        return Pooled(self.proj(output.squeeze(1)), weights[:, 1:])
