from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.by_sets import by_sets
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Tokens
from cenote.core.widths import require_divides
from cenote.pool.attention.blocks import TokenBatchNorm
from cenote.pool.base import Pool, Pooled

Activation = Literal["tanh", "relu"]


class AttentiveStatisticsPool(Pool):
    """Attention-weighted mean and standard deviation, the attention seeing each token beside the statistics of its set.

    `a = softmax_n(V f(W [x_n ; mean ; std] + b) + k)` per head, `m = sum_n a_n x_n`,
    `s = sqrt(max(sum_n a_n x_n^2 - m^2, eps))`, `y = [m ; s]`.

    Nothing is concatenated: `W [x_n ; mean ; std] + b = W_x x_n + (W_c [mean ; std] + b)`, and the second part is computed
    once per set.

    Args:
        dim: width of a token.
        hidden: width of the score network.
        heads: each has one weight per token and owns a slice of the channels; divides `dim`. `None`: one head per channel
            (ECAPA-TDNN); 1: one weight for all channels (Okabe).
        queries: number of independent sets of weights; the means of all stand first, then the deviations of all.
        context: whether the attention sees mean and deviation of the set; without, it sees the token alone.
        activation: `f`.
        batch_norm: whether a BatchNorm over the real tokens follows `f`.
        eps: floor of the variance.
        dropout: on the weights, while training.

    Raises:
        InputError: where the heads do not divide `dim`, or a number is out of range.

    Example:
        >>> output, weights = AttentiveStatisticsPool(16).attend(torch.randn(2, 9, 16))
        >>> output.shape, weights.shape
        (torch.Size([2, 32]), torch.Size([2, 16, 9]))
        >>> AttentiveStatisticsPool(16, heads=1, context=False)(torch.randn(2, 9, 16)).shape
        torch.Size([2, 32])

    Source: Okabe, Koshinaka, Shinoda, "Attentive Statistics Pooling for Deep Speaker Embedding", Interspeech 2018 (one
    weight, no context); Desplanques, Thienpondt, Demuynck, "ECAPA-TDNN", Interspeech 2020 (one weight per channel, context).

    Note:
        The second moment is taken around the mean of the set, which changes nothing but the rounding.
        The bias `k` drops out of the softmax; it is kept so that published weights load.
    """

    CONTEXT_EPS = 1e-8

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        heads: int | None = None,
        queries: int = 1,
        context: bool = True,
        activation: Activation = "tanh",
        batch_norm: bool = False,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        require_at_least(1, queries=queries, hidden=hidden)
        require_one_of(("tanh", "relu"), activation=activation)
        require_positive(eps=eps)
        super().__init__(dim, 2 * queries * dim)
        self.heads = dim if heads is None else heads
        require_divides("heads", self.heads, dim)
        self.queries = queries
        self.eps = eps
        self.token = nn.Linear(dim, hidden)
        self.context = nn.Linear(2 * dim, hidden, bias=False) if context else None
        self.activation = nn.Tanh() if activation == "tanh" else nn.ReLU()
        self.norm = TokenBatchNorm(hidden) if batch_norm else None
        self.score = nn.Linear(hidden, queries * self.heads)
        self.dropout = nn.Dropout(dropout)
        # both add the same number to the scores of all tokens
        self.inert_parameters = ("score.bias", "norm.bias") if batch_norm else ("score.bias",)

    def pool(self, tokens: Tokens) -> Pooled:
        weights = self.dropout(tokens.softmax(self.scores(tokens)))
        mean, variance = self.weighted_moments(tokens, weights)
        std = variance.clamp(min=self.eps).sqrt()
        return Pooled(torch.cat([mean, std], -1).to(tokens.values.dtype), weights)

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch moments"]:
        # a BatchNorm sees all sets together
        return (
            self.pool(tokens).output if self.norm is not None else by_sets(lambda some: self.pool(some).output, tokens)
        )

    def scores(self, tokens: Tokens) -> Float[Tensor, "*rows queries_heads"]:
        """Unnormalised score of each token for each query and head."""
        hidden = self.token(tokens.values)
        if self.context is not None:
            hidden = hidden + tokens.spread(self.context(self.statistics(tokens)))
        hidden = self.activation(hidden)
        return self.score(hidden if self.norm is None else self.norm.normalised(tokens, hidden))

    def statistics(self, tokens: Tokens) -> Float[Tensor, "batch twice_dim"]:
        """What the attention is told about the whole set: mean and population standard deviation."""
        return torch.cat([tokens.mean(), tokens.std(eps=self.CONTEXT_EPS)], -1)

    def weighted_moments(
        self, tokens: Tokens, weights: Float[Tensor, "*rows queries_heads"]
    ) -> tuple[Float[Tensor, "batch queries_dim"], Float[Tensor, "batch queries_dim"]]:
        """Mean and variance of each channel under the weights of its head, for every query."""
        wide = accumulation_dtype(tokens.values.dtype)
        x, w = tokens.values.to(wide), weights.to(wide)
        centre = tokens.mean(x)
        if self.training and self.dropout.p > 0:
            # dropped weights do not sum to one, so the shift would not cancel
            centre = torch.zeros_like(centre)
        z = x - tokens.spread(centre)
        first, second = self._per_head(tokens, w, z), self._per_head(tokens, w, z.square())
        return first + centre.repeat(1, self.queries), second - first.square()

    def _per_head(
        self, tokens: Tokens, weights: Float[Tensor, "*rows queries_heads"], v: Float[Tensor, "*rows dim"]
    ) -> Float[Tensor, "batch queries_dim"]:
        if self.heads == 1:
            return tokens.weighted_sum(weights, v).flatten(1)
        slices = v.unflatten(-1, (1, self.heads, -1))
        products = weights.unflatten(-1, (self.queries, self.heads)).unsqueeze(-1) * slices
        return tokens.sum(products.flatten(-3))
