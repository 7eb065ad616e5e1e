import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.sets import PaddedTokens
from cenote.pool.base import Pool
from cenote.pool.basic.mean import MeanPool
from cenote.pool.layers.base import LayerPool, LayersPooled


class WeightedLayerSum(LayerPool):
    """Learned weighted sum of the layers, then a pool over the tokens: the usual baseline of layer pools.

    `s = softmax(w)`, `x_n = gamma sum_l s_l h_ln`, `y = pool(x)`; with `norm` each `h_ln` is layer-normalised first, without
    learned numbers. At initialisation the sum is the mean of the layers.

    Args:
        dim: width of a token.
        layers: number of layers in the stack.
        norm: whether tokens are normalised before the sum, for layers of very different magnitude.
        tokens: the pool over the mixed tokens, any `cenote.pool.Pool` of width `dim`; default their mean.

    Raises:
        InputError: where `tokens` pools another width, or gives several vectors.

    Example:
        >>> pool = WeightedLayerSum(8, layers=6)
        >>> pool(torch.randn(2, 6, 5, 8)).shape, pool.layer_weights().sum().item()
        (torch.Size([2, 8]), 1.0)

    Source: Peters et al., "Deep contextualized word representations", NAACL 2018 (the "scalar mix" of ELMo).
    """

    def __init__(self, dim: int, layers: int, norm: bool = False, tokens: Pool | None = None) -> None:
        inner = MeanPool(dim) if tokens is None else tokens
        if inner.dim != dim or inner.vectors != 1:
            raise InputError(
                f"tokens: expected a pool of tokens of width {dim} that gives one vector, "
                f"got {type(inner).__name__} of width {inner.dim} with {inner.vectors} vectors"
            )
        super().__init__(dim, layers, inner.out_dim)
        self.norm = norm
        self.tokens = inner
        self.permutation_invariant = inner.permutation_invariant
        self.reads_cls = inner.reads_cls
        self.scores = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))

    def layer_weights(self) -> Float[Tensor, "layers"]:
        """`s`, which sums to 1."""
        return self.scores.softmax(0)

    def mix(self, x: Float[Tensor, "batch layers tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The weighted sum of the layers, token by token."""
        if self.norm:
            x = F.layer_norm(x, (self.dim,))
        return torch.einsum("l,blnd->bnd", self.gamma * self.layer_weights(), x)

    def pool(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> LayersPooled:
        output, weights = self.tokens.attend(PaddedTokens(self.mix(x), mask))
        if weights is None:
            return LayersPooled(output, None)
        return LayersPooled(output, torch.einsum("l,bhn->bhln", self.layer_weights(), weights))

    def pool_only(
        self, x: Float[Tensor, "batch layers tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch out_dim"]:
        return self.tokens(PaddedTokens(self.mix(x), mask))
