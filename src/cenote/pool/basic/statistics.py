import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.sets import Tokens
from cenote.pool.base import Pool, Pooled


class StatisticsPool(Pool):
    """Mean and standard deviation of each channel, side by side.

    `y = [mean_n x_n ; sqrt(mean_n (x_n - mean)^2 + eps)]`

    Args:
        dim: width of a token; the output is twice as wide.
        eps: added to the variance, so that the root has a finite gradient.

    Example:
        >>> StatisticsPool(1, eps=0.0)(torch.tensor([[[1.0], [3.0]]])).tolist()
        [[2.0, 1.0]]

    Source: Snyder et al., "Deep Neural Network Embeddings for Text-Independent Speaker Verification", 2017.
    """

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__(dim, 2 * dim)
        self.eps = eps

    def pool(self, tokens: Tokens) -> Pooled:
        return Pooled(self.pool_only(tokens), tokens.uniform())

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch out_dim"]:
        return torch.cat([tokens.mean(), tokens.std(eps=self.eps)], -1)
