"""MIDAM's bags: what a bag is pooled to, exactly and from a few of its instances.

Source: Zhu, Li, Zhang, Yang, Yang, "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.requirements import require_positive
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Tokens, as_tokens
from cenote.core.tokenwise import tokenwise
from cenote.pool.base import Pool, Pooled


class SmoothedMaxPool(Pool):
    """Smoothed maximum of each channel: between the mean (large `tau`) and the maximum (`tau` towards 0).

    `y_c = tau log( (1/N) sum_n exp(x_nc / tau) )`. The weight of a token is `softmax_n(x_nc / tau)`, which is the gradient of
    `y_c`, averaged over the channels.

    Args:
        dim: width of a token.
        tau: temperature, above 0.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0]]])
        >>> [round(SmoothedMaxPool(1, tau)(x).item(), 3) for tau in (1e-3, 0.1, 1e3)]
        [0.999, 0.931, 0.5]

    Source: Zhu et al., "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.
    """

    def __init__(self, dim: int, tau: float = 0.1) -> None:
        super().__init__(dim)
        require_positive(tau=tau)
        self.tau = tau

    def pool(self, tokens: Tokens) -> Pooled:
        return Pooled(self.pool_only(tokens), tokens.softmax(self._hot(tokens)).mean(-1, keepdim=True))

    def pool_only(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        return (self.tau * self.log_mean(tokens)).to(tokens.values.dtype)

    def log_mean(self, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        """`log mean_n exp(x_nc / tau)`, of half precision in float32."""
        hot = self._hot(tokens)
        return tokens.logsumexp(hot) - tokens.lengths().clamp(min=1).to(hot.dtype).log().unsqueeze(1)

    def _hot(self, tokens: Tokens) -> Float[Tensor, "*rows dim"]:
        return tokens.values.to(accumulation_dtype(tokens.values.dtype)) / self.tau

    def extra_repr(self) -> str:
        return f"dim={self.dim}, tau={self.tau}"


class AttentionStatistic(NamedTuple):
    """What the attention mode keeps of sampled instances: `s_n / s_d` and `log s_d`.

    Attributes:
        score: `sum_n exp(g_n) d_n / sum_n exp(g_n)`, the pooled score.
        log_mass: `log mean_n exp(g_n)`.
    """

    score: Float[Tensor, "bags"]
    log_mass: Float[Tensor, "bags"]


class BagScorer(nn.Module, ABC):
    """Scores bags and their instances; trained by `MIDAMTrainer`."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "bags instances *features"] | Tokens, mask: Bool[Tensor, "bags instances"] | None = None
    ) -> Float[Tensor, "bags"]:
        """The exact pooled score of whole bags; the higher, the more positive."""

    @abstractmethod
    def sampled(
        self, x: Float[Tensor, "bags instances *features"], mask: Bool[Tensor, "bags instances"] | None = None
    ) -> Float[Tensor, "bags"] | AttentionStatistic:
        """The statistic of sampled instances that the loss of this mode takes."""

    @abstractmethod
    def joined(self, parts: Sequence[Any], counts: Sequence[int]) -> Float[Tensor, "bags"]:
        """The pooled score of bags that came in parts: what `sampled` says of each part, and its number of instances."""

    @abstractmethod
    def instances(
        self, x: Float[Tensor, "bags instances *features"] | Tokens, mask: Bool[Tensor, "bags instances"] | None = None
    ) -> Float[Tensor, "bags instances"] | Float[Tensor, "total"]:
        """A score of each instance, 0 in padded slots."""


class MIDAMSmoothedMax(BagScorer):
    """Smoothed-max mode: `h(X) = tau log( mean_{x in X} exp(phi(x) / tau) )`.

    Args:
        phi: scores instances, `[..., features] -> [..., 1]`, each on its own.
        tau: temperature, above 0; the authors try 0.1 to 10.

    Example:
        >>> model = MIDAMSmoothedMax(torch.nn.Linear(5, 1), tau=0.5)
        >>> model(torch.randn(3, 7, 5)).shape
        torch.Size([3])

    Source: Zhu et al., "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.
    """

    def __init__(self, phi: nn.Module, tau: float = 0.1) -> None:
        super().__init__()
        self.phi = phi
        self.pooling = SmoothedMaxPool(1, tau)

    @property
    def tau(self) -> float:
        """The temperature."""
        return self.pooling.tau

    def forward(
        self, x: Float[Tensor, "bags instances *features"] | Tokens, mask: Bool[Tensor, "bags instances"] | None = None
    ) -> Float[Tensor, "bags"]:
        return self.pooling(scored(self.phi, x, mask)).squeeze(1)

    def sampled(
        self, x: Float[Tensor, "bags instances *features"], mask: Bool[Tensor, "bags instances"] | None = None
    ) -> Float[Tensor, "bags"]:
        """`log mean exp(phi / tau)` over the sampled instances."""
        return self.pooling.log_mean(scored(self.phi, x, mask)).squeeze(1)

    def joined(self, parts: Sequence[Float[Tensor, "bags"]], counts: Sequence[int]) -> Float[Tensor, "bags"]:
        shares = torch.tensor(counts, dtype=parts[0].dtype, device=parts[0].device) / sum(counts)
        return self.tau * (torch.stack(list(parts), -1) + shares.log()).logsumexp(-1)

    def instances(
        self, x: Float[Tensor, "bags instances *features"] | Tokens, mask: Bool[Tensor, "bags instances"] | None = None
    ) -> Float[Tensor, "bags instances"] | Float[Tensor, "total"]:
        """`phi` of each instance."""
        return scored(self.phi, x, mask).values.squeeze(-1)


class MIDAMAttention(BagScorer):
    """Attention mode: `h(X) = sum_x exp(g(x)) d(x) / sum_x exp(g(x))`, `g(x) = w_a . tanh(V e(x))`, `d(x) = w_c . e(x)`.

    Args:
        encoder: `e`, from instances to features, `[..., features] -> [..., dim]`, each on its own.
        dim: width of what it gives.
        hidden: rows of `V`.

    Example:
        >>> model = MIDAMAttention(torch.nn.Linear(5, 8), dim=8)
        >>> model(torch.randn(3, 7, 5)).shape
        torch.Size([3])

    Source: Zhu et al., "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.

    Note:
        The paper's `h` is the sigmoid of this; it changes no ranking, so that calling leaves it out, and the loss applies it.
    """

    def __init__(self, encoder: nn.Module, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = encoder
        self.attention = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.score = nn.Linear(dim, 1)

    def both(self, x: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows 2"]:
        """`[d(x), g(x)]` of each instance."""
        e = self.encoder(x)
        return torch.cat([self.score(e), self.attention(e)], -1)

    def forward(
        self, x: Float[Tensor, "bags instances *features"] | Tokens, mask: Bool[Tensor, "bags instances"] | None = None
    ) -> Float[Tensor, "bags"]:
        return statistic(scored(self.both, x, mask)).score

    def sampled(
        self, x: Float[Tensor, "bags instances *features"], mask: Bool[Tensor, "bags instances"] | None = None
    ) -> AttentionStatistic:
        """Weighted score and mass of the sampled instances."""
        return statistic(scored(self.both, x, mask))

    def joined(self, parts: Sequence[AttentionStatistic], counts: Sequence[int]) -> Float[Tensor, "bags"]:
        score, log_mass = (torch.stack(list(v), -1) for v in zip(*parts, strict=True))
        shares = torch.tensor(counts, dtype=score.dtype, device=score.device)
        return (score * (log_mass + shares.log()).softmax(-1)).sum(-1)

    def instances(
        self, x: Float[Tensor, "bags instances *features"] | Tokens, mask: Bool[Tensor, "bags instances"] | None = None
    ) -> Float[Tensor, "bags instances"] | Float[Tensor, "total"]:
        """The share of each instance in its bag's weights."""
        tokens = scored(self.both, x, mask)
        return tokens.softmax(tokens.values[..., 1:]).squeeze(-1)


def statistic(tokens: Tokens) -> AttentionStatistic:
    """Of tokens `[d, g]`.

    >>> statistic(as_tokens(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])))
    AttentionStatistic(score=tensor([2.]), log_mass=tensor([0.]))
    """
    d, g = tokens.values.split(1, -1)
    score = tokens.weighted_sum(tokens.softmax(g), d).flatten(1).squeeze(1)
    count = tokens.lengths().clamp(min=1).to(g.dtype).log()
    return AttentionStatistic(score, tokens.logsumexp(g).squeeze(1) - count)


def scored(phi: Callable[[Tensor], Tensor], x: Tensor | Tokens, mask: Bool[Tensor, "bags instances"] | None) -> Tokens:
    """The same sets with what `phi` says of each instance; a huge set goes through in pieces."""
    if isinstance(x, Tensor) and x.dim() > 3:
        # instances that are images: their features are seen by phi alone
        flat = as_tokens(x.flatten(2), mask)
        return flat.replace(tokenwise(lambda rows: phi(rows.unflatten(-1, x.shape[2:])), flat.values))
    tokens = as_tokens(x, mask)
    return tokens.replace(tokenwise(phi, tokens.values))
