from jaxtyping import Float
from torch import Tensor

from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled
from cenote.pool.basic.positions import all_of


class LastPool(Pool):
    """The last real token: the end-of-sequence state of a causal model.

    `y = x_{N-1}`

    Args:
        dim: width of a token.

    Example:
        >>> LastPool(1)(torch.tensor([[[7.0], [3.0]]]), torch.tensor([[True, False]])).tolist()
        [[7.0]]
    """

    permutation_invariant = False
    prefix = "keep"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def pool(self, tokens: Tokens) -> Pooled:
        return Pooled(self.pool_only(tokens), all_of(tokens, tokens.lengths() - 1))

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        return tokens.token(-1)
