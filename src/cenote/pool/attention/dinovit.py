from cenote.core.sets import PaddedTokens
from cenote.core.widths import largest_divisor
from cenote.pool.attention.blocks import TransformerBlock
from cenote.pool.base import PaddedPool, Pooled


class DinoViTPool(PaddedPool):
    """One more block of a vision transformer, then the mean.

    `z = x + SelfAttention(LN(x))`, `y = mean_n (z_n + MLP(LN(z_n)))`.

    There are no weights to show: after the block every token has taken from every other.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 8, or the largest divisor below it.
        mlp_ratio: hidden width of the MLP by `dim`.
        qkv_bias: whether queries, keys and values have biases.

    Example:
        >>> DinoViTPool(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: the block of Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, in DINOv2's form; as a probe: Psomas
    et al., "Attention, Please!", 2025.
    """

    pairwise = True

    def __init__(self, dim: int, heads: int | None = None, mlp_ratio: float = 4.0, qkv_bias: bool = False) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 8) if heads is None else heads
        self.block = TransformerBlock(dim, self.heads, mlp_ratio, qkv_bias)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        return Pooled(tokens.mean(self.block(tokens.values, tokens.mask)), None)
