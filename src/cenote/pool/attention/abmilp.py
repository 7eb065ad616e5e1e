import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.sets import PaddedTokens, Tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.attention.blocks import SelfAttention, require_square, require_tokens
from cenote.pool.base import PaddedPool, Pooled

AppliesTo = Literal["none", "map", "both"]
Activation = Literal["tanh", "relu"]


class ABMILP(PaddedPool):
    """Softmax attention whose scores come from a small network, the tokens having looked at each other before.

    `z = SelfAttention(x)` with one head, `a = softmax_n(w . MLP(s_n))`, `y = sum_n a_n v_n`, where `(s, v)` is `(x, x)`,
    `(z, x)` or `(z, z)` for `self_attention` `"none"`, `"map"` and `"both"`.

    The weights are `a`; with `"both"` they say how much each attended token `z_n` counts.

    Args:
        dim: width of a token.
        self_attention: what the self-attention is applied to: nothing, the scores, or the scores and the values.
        activation: of the score network, `"tanh"` or `"relu"`.
        depth: number of linear maps of the score network, the last one to a single number.

    Raises:
        InputError: for an unknown option or a depth below 1.

    Example:
        >>> output, weights = ABMILP(16).attend(torch.randn(2, 9, 16))
        >>> output.shape, weights.shape
        (torch.Size([2, 16]), torch.Size([2, 1, 9]))

    Source: Przewiezlikowski et al., "Beyond [cls]: Exploring the True Potential of Masked Image Modeling
    Representations", 2024; this form: Psomas et al., "Attention, Please!", 2025.

    Note:
        The bias of the last linear map, which drops out of the softmax, is left out. `self_attention` defaults to `"both"`,
        as in the authors' training script; their class itself defaults to `"none"`.
    """

    def __init__(
        self, dim: int, self_attention: AppliesTo = "both", activation: Activation = "tanh", depth: int = 2
    ) -> None:
        super().__init__(dim)
        require_one_of(("none", "map", "both"), self_attention=self_attention)
        require_one_of(("tanh", "relu"), activation=activation)
        require_at_least(1, depth=depth)
        self.self_attention = self_attention
        self.pairwise = self_attention != "none"
        self.activation = activation
        self.self_attn = None if self_attention == "none" else SelfAttention(dim, heads=1)
        self.hidden = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth - 1))
        self.score = nn.Linear(dim, 1, bias=False)

    def pool(self, tokens: Tokens) -> Pooled:
        # without self-attention a ragged batch need not be padded
        return super().pool(tokens) if self.self_attn is not None else self._pooled(tokens, tokens.values)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        x = tokens.values
        return self._pooled(tokens, x if self.self_attn is None else self.self_attn(x, tokens.mask))

    def scores(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows 1"]:
        """Unnormalised score of each token."""
        for layer in self.hidden:
            x = torch.tanh(layer(x)) if self.activation == "tanh" else F.relu(layer(x))
        return self.score(x)

    def _pooled(self, tokens: Tokens, attended: Float[Tensor, "*rows dim"]) -> Pooled:
        weights = tokens.softmax(tokenwise(self.scores, self._positioned(attended)))
        values = attended if self.self_attention == "both" else None
        return Pooled(tokens.weighted_sum(weights, values).squeeze(1), weights)

    def _positioned(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return x


class ABMILPPositions(ABMILP):
    """ABMILP whose score network also sees where a patch stands: `s_n + p_n` with fixed 2-D sine-cosine positions.

    Args:
        dim: width of a token.
        tokens: number of patches, a square grid row by row.
        self_attention, activation, depth: as in `ABMILP`.

    Example:
        >>> ABMILPPositions(16, tokens=9)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: as `ABMILP`.

    Note:
        The authors need a width divisible by 4; here a table of the next such width is cut.
    """

    permutation_invariant = False
    fixed_tokens = True
    pos_embed: Tensor

    def __init__(
        self,
        dim: int,
        tokens: int,
        self_attention: AppliesTo = "both",
        activation: Activation = "tanh",
        depth: int = 2,
    ) -> None:
        super().__init__(dim, self_attention, activation, depth)
        self.tokens = tokens
        self.register_buffer("pos_embed", sincos_positions(dim, require_square(tokens)).unsqueeze(0))

    def pool(self, tokens: Tokens) -> Pooled:
        return PaddedPool.pool(self, tokens)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        require_tokens(tokens, self.tokens)
        return super().pool_padded(tokens)

    def _positioned(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return x + self.pos_embed.to(x.dtype)


def sincos_positions(dim: int, side: int) -> Float[Tensor, "positions dim"]:
    """Fixed positions of a square grid: `[sin(c w), cos(c w), sin(r w), cos(r w)]` of column `c` and row `r`.

    `w_i = 10000^(-4 i / dim)` for `i < dim / 4`.
    """
    quarter = math.ceil(dim / 4)
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
    return table[:, :dim].to(torch.get_default_dtype())
