import math
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.requirements import require_one_of
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Tokens
from cenote.pool.attention.blocks import TokenBatchNorm
from cenote.pool.base import Pool, Pooled

Activation = Literal["relu", "leaky_relu"]


class DolgPool(Pool):
    """DOLG's spatial attention: the mean of unit vectors, each weighted by a positive score of its own.

    `z_n = BatchNorm(W x_n)`, `s_n = softplus(w . relu(z_n) + c)`, `y = (1/N) sum_n s_n z_n / |z_n|`.

    Not a softmax: the weights `s_n / N` are positive and need not sum to 1.

    Args:
        dim: width of a token.
        hidden: width of `z` and of the output; default `dim`.
        activation: before the score, `"relu"` or `"leaky_relu"`.
        eps: of the BatchNorm.

    Raises:
        InputError: for an unknown activation.

    Example:
        >>> DolgPool(16)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 16])

    Source: Yang et al., "DOLG: Single-Stage Image Retrieval with Deep Orthogonal Fusion of Local and Global Features",
    ICCV 2021; this form: Psomas et al., "Attention, Please!", 2025.

    Note:
        With `hidden` other than `dim` the authors' code folds the wider map back onto `dim` channels by a reshape that mixes
        neighbouring channels; here the output keeps the width of the map. Padding takes no part in the batch statistics.
        The bias of the first map, which the BatchNorm takes away again, is left out; published weights load with it
        subtracted from the running mean.
    """

    def __init__(self, dim: int, hidden: int | None = None, activation: Activation = "relu", eps: float = 1e-5) -> None:
        super().__init__(dim, hidden)
        require_one_of(("relu", "leaky_relu"), activation=activation)
        self.activation = activation
        self.conv1 = nn.Linear(dim, self.out_dim, bias=False)
        self.bn = TokenBatchNorm(self.out_dim, eps=eps)
        self.conv2 = nn.Linear(self.out_dim, 1)
        nn.init.normal_(self.conv1.weight, std=math.sqrt(2 / self.out_dim))
        nn.init.normal_(self.conv2.weight, std=math.sqrt(2))

    def pool(self, tokens: Tokens) -> Pooled:
        features, scores = self.attended(tokens)
        weights = tokens.replace(scores * tokens.uniform()).values
        return Pooled(tokens.weighted_sum(weights, features).squeeze(1), weights)

    def attended(self, tokens: Tokens) -> tuple[Float[Tensor, "*rows out_dim"], Float[Tensor, "*rows 1"]]:
        """Unit vector and score of each token."""
        z = self.bn.normalised(tokens, self.conv1(tokens.values))
        active = F.relu(z) if self.activation == "relu" else F.leaky_relu(z)
        unit = F.normalize(z.to(accumulation_dtype(z.dtype)), dim=-1).to(z.dtype)
        return unit, F.softplus(self.conv2(active))
