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


class MeanAllPool(MeanPool):
    """Mean of all tokens, [CLS], [SEP] and registers included: the mean of sentence-transformers.

    `y = (1/N) sum_n x_n`; on its own as `MeanPool`, but a probe does not take the prefix tokens away from it.

    Args:
        dim: width of a token.

    Example:
        >>> MeanAllPool(1)(torch.tensor([[[1.0], [3.0]]])).tolist()
        [[2.0]]
    """

    prefix = "keep"
