from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled


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
        return Pooled(tokens.token(-1), None)
