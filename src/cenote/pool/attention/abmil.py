from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.hidden import hidden_scores
from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled


class ABMIL(Pool):
    """Attention pooling of bags, plain or gated.

    `a = softmax_n(w . tanh(V x_n + b_V))`, gated: `a = softmax_n(w . (tanh(V x_n + b_V) * sigmoid(U x_n + b_U)))`;
    `y = sum_n a_n x_n`.

    Args:
        dim: width of a token.
        hidden: width of the score network.
        gated: whether the sigmoid gate is there.
        heads: number of independent score vectors `w`; the outputs stand side by side.

    Example:
        >>> ABMIL(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 8])

    Source: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018.
    """

    def __init__(self, dim: int, hidden: int = 128, gated: bool = True, heads: int = 1) -> None:
        super().__init__(dim, heads * dim)
        self.heads = heads
        self.tanh = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden) if gated else None
        self.score = nn.Linear(hidden, heads, bias=False)

    def pool(self, tokens: Tokens) -> Pooled:
        weights = tokens.softmax(self.scores(tokens.values))
        return Pooled(tokens.weighted_sum(weights).flatten(1), weights)

    def scores(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows heads"]:
        """Unnormalised score of each token."""
        return hidden_scores(x, self.tanh, self.gate, self.score)
