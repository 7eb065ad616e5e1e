from jaxtyping import Float
from torch import Tensor

from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled


class MaxPool(Pool):
    """Largest value of each channel over the tokens.

    `y_c = max_n x_nc`. The weight of a token is the share of channels whose maximum it holds (ties share equally).

    Args:
        dim: width of a token.

    Example:
        >>> MaxPool(2)(torch.tensor([[[0.0, 2.0], [4.0, 1.0]]])).tolist()
        [[4.0, 2.0]]
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def pool(self, tokens: Tokens) -> Pooled:
        output = tokens.max()
        holds = tokens.replace((tokens.values == tokens.spread(output)).to(output.dtype)).values
        share = holds / tokens.spread(tokens.sum(holds).clamp(min=1))
        return Pooled(output, share.mean(-1, keepdim=True))

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        return tokens.max()
