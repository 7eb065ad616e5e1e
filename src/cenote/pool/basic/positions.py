from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.sets import Tokens


def all_of(tokens: Tokens, position: Int[Tensor, "batch"]) -> Float[Tensor, "*rows one"]:
    """The weights of one token alone: 1 on the one at this position of its set, 0 elsewhere; all 0 where none is there."""
    own = tokens.positions()
    return ((own == tokens.spread(position)) & (own >= 0)).to(tokens.values.dtype).unsqueeze(-1)
