from jaxtyping import Float
from torch import Tensor

from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled


class SumPool(Pool):
    """Sum of the tokens: a mean that knows how many tokens there were.

    `y = sum_n x_n`

    Args:
        dim: width of a token.

    Example:
        >>> SumPool(2)(torch.tensor([[[0.0, 2.0], [4.0, 2.0]]])).tolist()
        [[4.0, 4.0]]
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def pool(self, tokens: Tokens) -> Pooled:
        one = tokens.replace(tokens.values.new_ones((*tokens.values.shape[:-1], 1)))
        return Pooled(tokens.sum(), one.values)

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        return tokens.sum()
