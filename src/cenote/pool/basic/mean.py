from jaxtyping import Float
from torch import Tensor

from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled


class MeanPool(Pool):
    """Mean of the tokens, the pooling that everything else is compared with.

    `y = (1/N) sum_n x_n`

    Args:
        dim: width of a token.

    Example:
        >>> MeanPool(2)(torch.tensor([[[0.0, 2.0], [4.0, 2.0]]])).tolist()
        [[2.0, 2.0]]
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def pool(self, tokens: Tokens) -> Pooled:
        return Pooled(tokens.mean(), tokens.uniform())

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        return tokens.mean()
