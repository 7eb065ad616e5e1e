import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.sets import PaddedTokens
from cenote.core.widths import largest_divisor
from cenote.pool.attention.blocks import TransformerBlock
from cenote.pool.base import PaddedPool, Pooled


class DinoViTPool(PaddedPool):
    """One more block of a vision transformer, then the mean.

    `z = x + SelfAttention(LN(x))`, `y = mean_n (z_n + MLP(LN(z_n)))`.

    The weights are those of attention rollout: of what a token holds after the attention, half came from itself through the
    residual connection and half from the others as its head attended, `w_m = mean_n (1[n = m] + a_nm) / 2`.

    Args:
        dim: width of a token.
        heads: divides `dim`. Default 8, or the largest divisor below it.
        mlp_ratio: hidden width of the MLP by `dim`.
        qkv_bias: whether queries, keys and values have biases.

    Example:
        >>> DinoViTPool(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: the block of Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, in DINOv2's form; as a probe: Psomas
    et al., "Attention, Please!", 2025. Rollout: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020.
    """

    pairwise = True

    def __init__(self, dim: int, heads: int | None = None, mlp_ratio: float = 4.0, qkv_bias: bool = False) -> None:
        super().__init__(dim)
        self.heads = largest_divisor(dim, 8) if heads is None else heads
        self.block = TransformerBlock.of_vit(dim, self.heads, mlp_ratio, qkv_bias)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        maps = self.block.maps(tokens.values, tokens.mask)
        even = tokens.uniform()
        # [batch, heads, queries, tokens] -> mean over the real queries [batch, tokens, heads]
        taken = torch.einsum("bhqn,bq->bnh", maps, even.squeeze(-1))
        return Pooled(self.padded_only(tokens), (even + taken) / 2)

    def padded_only(self, tokens: PaddedTokens) -> Float[Tensor, "batch dim"]:
        return tokens.mean(self.block(tokens.values, tokens.mask))
