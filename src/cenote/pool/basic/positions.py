import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.sets import Bags, PaddedTokens, Tokens


def positions(tokens: Tokens) -> Int[Tensor, "*rows"]:
    """The number of each token within its set, from 0; of padded slots -1.

    >>> positions(Bags(torch.zeros(5, 1), torch.tensor([0, 2, 5]))).tolist()
    [0, 1, 0, 1, 2]
    """
    rows = tokens.values.shape[:-1]
    if isinstance(tokens, Bags):
        return torch.arange(rows[0], device=tokens.values.device) - tokens.spread(tokens.offsets[:-1])
    assert isinstance(tokens, PaddedTokens)
    if tokens.mask is None:
        return torch.arange(rows[1], device=tokens.values.device).expand(rows)
    return (tokens.mask.cumsum(1) - 1).masked_fill(~tokens.mask, -1)


def all_of(tokens: Tokens, place: Int[Tensor, "batch"]) -> Float[Tensor, "*rows one"]:
    """The weights of one token alone: 1 on the one at this place of its set, 0 elsewhere."""
    return (positions(tokens) == tokens.spread(place)).to(tokens.values.dtype).unsqueeze(-1)
