"""Clusters of least (weighted) squared error, as their medoids or their means."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.clusters import drawn, farthest, heaviest, kmeans, kmedoids, squared_distances
from cenote.core.reduced import Reduced, merged
from cenote.core.requirements import require_at_least, require_one_of
from cenote.reduce.base import BudgetReducer

INITS = ("heaviest", "farthest", "random")
Init = Literal["heaviest", "farthest", "random"]


def significance(
    attention: Float[Tensor, "batch heads queries tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch tokens"]:
    """What each token is given in all: `w_i = sum_h sum_q A_hqi`, [CLS]'s query included; leave its column out afterwards.

    Args:
        attention: after the softmax.
        mask: the queries that count, where queries are tokens; None for all.

    Source:
        Goyal et al. 2020, "PoWER-BERT", arXiv 2001.08950; Marin et al. 2021, arXiv 2110.03860.
    """
    if mask is not None:
        attention = attention.masked_fill(~mask[:, None, :, None], 0.0)
    return attention.sum((1, 2))


class _Clusters(BudgetReducer):
    """Clusters by squared distances, from first centres of one's choice."""

    needs = frozenset({"attention"})
    rows = "all"

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        weighted: bool = True,
        init: Init | None = None,
        iterations: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding)
        require_at_least(0, iterations=iterations)
        self.init = init or ("heaviest" if weighted else "farthest")
        require_one_of(INITS, init=self.init)
        self.weighted, self.iterations, self.seed = weighted, iterations, seed
        self.needs = frozenset({"attention"}) if weighted or self.init == "heaviest" else frozenset()  # type: ignore[misc]
        self.order_matters = self.init == "random"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weighted={self.weighted}, init={self.init!r}, iterations={self.iterations}"

    def _first(
        self,
        distances: Tensor,
        weights: Tensor | None,
        counts: Int[Tensor, "batch"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Int[Tensor, "batch most"]:
        if self.init == "random":
            return drawn(counts, mask, self.seed)
        if self.init == "farthest":
            return farthest(distances, counts, mask)
        assert weights is not None
        return heaviest(weights, counts, mask)


class KMedoidsTokens(_Clusters):
    """The tokens from which all can be rebuilt best: medoids by significance, WK-Medoids.

    `sum_i w_i min_k |x_i - x_{c_k}|^2`, descended by assigning each token to the nearest medoid and choosing of each cluster
    that member to which the members are nearest, by their weights. `w_i = sum_h sum_q A_hqi`.

    Args:
        factor, tokens, fraction, rounding: how many are left, as `cenote.reduce.Budget`; where all are, nothing changes.
        weighted: weigh tokens by what they are given in attention; else by their sizes.
        init: first medoids: the `"heaviest"` tokens, those `"farthest"` from each other, or `"random"` ones; None for the
            heaviest where weighted, the farthest where not.
        iterations: how often medoids are chosen.
        output: `"medoid"`: rows of the input; `"mean"`: the weighted mean of each cluster.
        seed: of random medoids.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [2.0], [8.0], [9.0]]])
        >>> KMedoidsTokens(tokens=2, weighted=False)(x).tokens.flatten().tolist()
        [1.0, 8.0]

    Source:
        Marin et al. 2021, "Token Pooling in Vision Transformers", arXiv 2110.03860.

    Note:
        The paper stands the operator between attention and MLP of each block, as `cenote.reduce.ReducibleViT` does; behind a
        block `cenote.models.live.Shorten` with `rows="all"`, which the significance of all queries needs.
    """

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        weighted: bool = True,
        init: Init | None = None,
        iterations: int = 5,
        output: Literal["medoid", "mean"] = "medoid",
        seed: int = 0,
    ) -> None:
        super().__init__(
            factor=factor,
            tokens=tokens,
            fraction=fraction,
            rounding=rounding,
            weighted=weighted,
            init=init,
            iterations=iterations,
            seed=seed,
        )
        require_one_of(("medoid", "mean"), output=output)
        self.output = output
        self.keeps: Literal["members", "means", "directions"] = "members" if output == "medoid" else "means"

    def clusters(
        self,
        x: Float[Tensor, "batch tokens dim"],
        weights: Float[Tensor, "batch tokens"] | None,
        counts: Int[Tensor, "batch"],
        mask: Bool[Tensor, "batch tokens"],
        given: Float[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch most"]]:
        """The cluster of each token and the medoid of each cluster; `given` are weights for the first medoids alone."""
        distances = squared_distances(x, mask)
        first = self._first(distances, weights if given is None else given, counts, mask)
        return kmedoids(distances, first, counts, mask, weights, iterations=self.iterations)

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        attention: Float[Tensor, "batch heads tokens"] | None = None,
    ) -> Reduced:
        significant = None if attention is None else attention.detach().sum(1)
        weights = significant if self.weighted else sizes
        counts = self.budget.of(mask.sum(1))
        assignment, medoids = self.clusters(x, weights, counts, mask, significant)
        found = merged(x, assignment, medoids.shape[1], sizes, weights)
        if self.output == "mean":
            return found
        rows = x[torch.arange(len(x), device=x.device)[:, None], medoids]
        return found._replace(tokens=torch.where(found.real.unsqueeze(-1), rows, 0.0))

    def multiply_adds(self, tokens: int, left: int, dim: int) -> int:  # noqa: ARG002
        """Distances once, and sums of them in each iteration."""
        return tokens**2 * (dim + self.iterations)


class KMeansTokens(_Clusters):
    """The vectors from which all tokens can be rebuilt best: means by significance, WKM.

    `sum_i w_i min_k |x_i - c_k|^2`, descended by Lloyd's algorithm; `w_i = sum_h sum_q A_hqi`.

    Args:
        factor, tokens, fraction, rounding: how many are left; where all are, nothing changes.
        weighted: weigh tokens by what they are given in attention; else by their sizes.
        init: first centres: the `"heaviest"` tokens, those `"farthest"` from each other, or `"random"` ones; None for the
            heaviest where weighted, the farthest where not.
        iterations: how often centres are moved.
        seed: of random centres.

    Example:
        >>> x = torch.tensor([[[0.0], [1.0], [2.0], [8.0], [10.0]]])
        >>> KMeansTokens(tokens=2, weighted=False)(x).tokens.flatten().tolist()
        [1.0, 9.0]

    Source:
        Marin et al. 2021, "Token Pooling in Vision Transformers", arXiv 2110.03860.
    """

    mean_weights = "own"

    def clusters(
        self,
        x: Float[Tensor, "batch tokens dim"],
        weights: Float[Tensor, "batch tokens"] | None,
        counts: Int[Tensor, "batch"],
        mask: Bool[Tensor, "batch tokens"],
        given: Float[Tensor, "batch tokens"] | None = None,
    ) -> Int[Tensor, "batch tokens"]:
        """The cluster of each token; `given` are weights for the first centres alone."""
        distances = squared_distances(x, mask) if self.init == "farthest" else x
        first = self._first(distances, weights if given is None else given, counts, mask)
        return kmeans(x, first, counts, mask, weights, iterations=self.iterations)

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        attention: Float[Tensor, "batch heads tokens"] | None = None,
    ) -> Reduced:
        significant = None if attention is None else attention.detach().sum(1)
        weights = significant if self.weighted else sizes
        counts = self.budget.of(mask.sum(1))
        assignment = self.clusters(x, weights, counts, mask, significant)
        return merged(x, assignment, int(counts.max()) if counts.numel() else 0, sizes, weights)

    def multiply_adds(self, tokens: int, left: int, dim: int) -> int:
        """Distances to the centres and new means in each iteration, and where each token goes in the end."""
        return (self.iterations + 1) * tokens * left * dim + self.iterations * tokens * dim
