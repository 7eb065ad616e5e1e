"""Amortised clustering: a network reads a set of points and writes the parameters of their mixture of Gaussians."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.sets import PaddedTokens


class GaussianMixtures(NamedTuple):
    """A batch of mixtures of diagonal Gaussians, as a likelihood head: minimise `-mixtures.log_likelihood(x)`.

    `log p(x) = logsumexp_k (log(pi_k + 1e-10) + sum_d log N(x_d; mu_kd, sigma_kd))`.

    Attributes:
        pi: `[batch, components]` mixing weights.
        mu, sigma: `[batch, components, dim]` means and standard deviations.

    Example:
        >>> mixtures = GaussianMixtures.from_raw(torch.randn(3, 4, 5))  # 4 components in 2 dimensions
        >>> mixtures.log_likelihood(torch.randn(3, 20, 2)).shape
        torch.Size([])

    Source: Lee et al., "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019.
    """

    pi: Float[Tensor, "batch components"]
    mu: Float[Tensor, "batch components dim"]
    sigma: Float[Tensor, "batch components dim"]

    @classmethod
    def from_raw(cls, raw: Float[Tensor, "batch components one_plus_two_dim"]) -> GaussianMixtures:
        """Read a network's outputs: softmax over the components of channel 0, means, softplus of the rest.

        Raises:
            InputError: where the number of channels is not `1 + 2 dim`.
        """
        channels = raw.shape[-1]
        if channels < 3 or channels % 2 == 0:
            raise InputError(f"raw: expected 1 + 2 * dim channels, got {channels}; set the network's out_dim so")
        dim = channels // 2
        return cls(raw[..., 0].softmax(-1), raw[..., 1 : 1 + dim], F.softplus(raw[..., 1 + dim :]))

    def joint(self, x: Float[Tensor, "batch points dim"]) -> Float[Tensor, "batch points components"]:
        """`log(pi_k + 1e-10) + log N(x; mu_k, sigma_k)` of each point and component."""
        mu, sigma = self.mu.unsqueeze(1), self.sigma.unsqueeze(1)
        z = (x.unsqueeze(2) - mu) / sigma
        density = (-0.5 * math.log(2 * math.pi) - sigma.log() - 0.5 * z.square()).sum(-1)
        return density + (self.pi + 1e-10).log().unsqueeze(1)

    def log_likelihood(
        self, x: Float[Tensor, "batch points dim"], mask: Bool[Tensor, "batch points"] | None = None
    ) -> Float[Tensor, ""]:
        """Mean log-likelihood of a point, over all real points of all sets."""
        per_point = self.joint(_cleaned(x, mask)).logsumexp(-1)
        if mask is None:
            return per_point.mean()
        return per_point.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)

    def log_likelihoods(
        self, x: Float[Tensor, "batch points dim"], mask: Bool[Tensor, "batch points"] | None = None
    ) -> Float[Tensor, "batch"]:
        """Mean log-likelihood of a real point of each set; 0 for a set without points."""
        return PaddedTokens(self.joint(_cleaned(x, mask)).logsumexp(-1, keepdim=True), mask).mean().squeeze(1)

    def labels(self, x: Float[Tensor, "batch points dim"]) -> Int[Tensor, "batch points"]:
        """The component that most likely made each point."""
        return self.joint(x).argmax(-1)

    def em_step(
        self, x: Float[Tensor, "batch points dim"], mask: Bool[Tensor, "batch points"] | None = None
    ) -> GaussianMixtures:
        """The mixtures after one step of expectation maximisation on the points.

        A component that takes no point keeps its mean and standard deviation.
        """
        x = _cleaned(x, mask)
        share = self.joint(x).softmax(-1)
        share = share if mask is None else share.masked_fill(~mask.unsqueeze(-1), 0)
        count = share.sum(1)
        per_point = (share / count.clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(1)).transpose(1, 2)
        mu = per_point @ x
        spread = (x.unsqueeze(1) - mu.unsqueeze(2)).square()
        sigma = torch.einsum("bkn,bknd->bkd", per_point, spread).sqrt()
        # a component that holds one point, or copies of one, would shrink to a spike of infinite likelihood
        alive = (count.unsqueeze(-1) > 1e-6) & (sigma > 1e-6)
        return GaussianMixtures(
            count / count.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny),
            torch.where(alive, mu, self.mu),
            torch.where(alive, sigma, self.sigma),
        )


class ClusteringScores(NamedTuple):
    """How well mixtures explain sets of points, one number for each set.

    Attributes:
        direct, after_em: mean log-likelihood of a point as the network says, and after one step of expectation maximisation.
        oracle: under the true parameters.
        rand: adjusted Rand index of the hard assignment after that step, 1 where it is the true one.
    """

    direct: Float[Tensor, "batch"]
    after_em: Float[Tensor, "batch"]
    oracle: Float[Tensor, "batch"]
    rand: Float[Tensor, "batch"]


@torch.no_grad()
def clustering_scores(
    mixtures: GaussianMixtures,
    x: Float[Tensor, "batch points dim"],
    labels: Int[Tensor, "batch points"],
    truth: GaussianMixtures,
    mask: Bool[Tensor, "batch points"] | None = None,
) -> ClusteringScores:
    """Score a network's mixtures against the true ones, set by set.

    Args:
        mixtures: as the network says.
        x, labels, truth: as `sample_mixtures` gives them.
        mask: True on real points.

    Example:
        >>> x, labels, truth = sample_mixtures(3, 200, generator=torch.Generator().manual_seed(0))
        >>> scores = clustering_scores(truth, x, labels, truth)
        >>> torch.equal(scores.direct, scores.oracle), bool((scores.after_em > scores.direct).all())
        (True, True)

    Source: the measures of Lee et al., ICML 2019.
    """
    better = mixtures.em_step(x, mask)
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    found = better.labels(_cleaned(x, mask))
    rand = [adjusted_rand_index(a[m], b[m]) for a, b, m in zip(found, labels, real, strict=True)]
    return ClusteringScores(
        mixtures.log_likelihoods(x, mask),
        better.log_likelihoods(x, mask),
        truth.log_likelihoods(x, mask),
        x.new_tensor(rand),
    )


def adjusted_rand_index(first: Int[Tensor, "points"], second: Int[Tensor, "points"]) -> float:
    """Share of the pairs of points on which two clusterings agree, less what chance gives: 1 where they are the same.

    >>> round(adjusted_rand_index(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 2])), 3)
    0.571
    """
    _, a = first.unique(return_inverse=True)
    _, b = second.unique(return_inverse=True)
    columns = int(b.max()) + 1 if len(b) else 1
    table = torch.bincount(a * columns + b, minlength=columns).double()
    together, of_a, of_b = (_pairs(n) for n in (table, a.bincount().double(), b.bincount().double()))
    chance = of_a * of_b / max(_pairs(torch.tensor([float(len(a))])), 1.0)
    most = (of_a + of_b) / 2
    return 1.0 if most == chance else (together - chance) / (most - chance)


def _pairs(counts: Float[Tensor, "groups"]) -> float:
    return float((counts * (counts - 1) / 2).sum())


def sample_mixtures(
    batch: int,
    points: int,
    components: int = 4,
    dim: int = 2,
    sigma: float = 0.3,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "batch points dim"], Int[Tensor, "batch points"], GaussianMixtures]:
    """Clustering problems: `(x, labels, truth)`.

    Weights are drawn from Dirichlet(1), means uniformly from `[-4, 4]^dim`; every component has standard deviation `sigma`.

    Args:
        batch: how many problems.
        points: of each problem.
        components: mixed in each.
        dim: width of a point.
        sigma: standard deviation of each component, in every direction.
        generator: of the draws; PyTorch's own by default.

    Example:
        >>> x, labels, truth = sample_mixtures(10, 300)
        >>> x.shape, labels.shape, truth.mu.shape
        (torch.Size([10, 300, 2]), torch.Size([10, 300]), torch.Size([10, 4, 2]))
    """
    # Dirichlet(1) is a normalised row of exponentials; torch.distributions takes no generator
    weights = torch.empty(batch, components).exponential_(generator=generator)
    pi = weights / weights.sum(-1, keepdim=True)
    mu = 8 * torch.rand(batch, components, dim, generator=generator) - 4
    labels = torch.multinomial(pi, points, replacement=True, generator=generator)
    centres = mu.gather(1, labels.unsqueeze(-1).expand(-1, -1, dim))
    x = centres + sigma * torch.randn(batch, points, dim, generator=generator)
    return x, labels, GaussianMixtures(pi, mu, torch.full_like(mu, sigma))


def _cleaned(x: Tensor, mask: Bool[Tensor, "batch points"] | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
