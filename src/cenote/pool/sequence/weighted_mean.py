from jaxtyping import Float
from torch import Tensor

from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled


class PositionWeightedMean(Pool):
    """Mean of the tokens in which later tokens weigh more: in a causal model they have seen more of the sequence.

    `w_n = n / sum_{i=1..N} i` for `n = 1..N`, `y = sum_n w_n x_n`

    Args:
        dim: width of a token.

    Example:
        >>> PositionWeightedMean(1)(torch.tensor([[[3.0], [9.0]]])).tolist()
        [[7.0]]

    Source: Muennighoff, "SGPT: GPT Sentence Embeddings for Semantic Search", 2022.

    Note:
        Positions are counted among the real tokens, so that padding on the left, on the right or in between changes nothing.
    """

    permutation_invariant = False
    prefix = "keep"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def pool(self, tokens: Tokens) -> Pooled:
        ranks = ranks_in_sets(tokens)
        counts = tokens.lengths().to(ranks.dtype).clamp(min=1).unsqueeze(-1)
        weights = (ranks / tokens.spread(counts * (counts + 1) / 2)).to(tokens.values.dtype)
        return Pooled(tokens.weighted_sum(weights).squeeze(1), weights)


def ranks_in_sets(tokens: Tokens) -> Float[Tensor, "*rows 1"]:
    """1 for the first real token of each set, 2 for the second, and so on; 0 in padded slots."""
    return (tokens.positions() + 1).unsqueeze(-1).to(accumulation_dtype(tokens.values.dtype))
