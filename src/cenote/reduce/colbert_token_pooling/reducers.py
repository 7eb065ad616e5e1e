"""The poolings of documents as reducers, for batches of any sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import Bags
from cenote.core.clusters import cosine_distances, cosine_kmeans, cut, ward_tree
from cenote.core.reduced import Reduced, merged
from cenote.core.requirements import require_at_least
from cenote.reduce.base import Budget, BudgetReducer
from cenote.reduce.colbert_token_pooling.documents import sequential_labels, unit_means, variant_of


class _ClusterMeans(BudgetReducer):
    """Means of clusters, of unit length or as they are."""

    counts: Literal["exact", "at most", "free"] = "at most"

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        unit_norm: bool = True,
    ) -> None:
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding)
        self.unit_norm = unit_norm
        self.keeps = "directions" if unit_norm else "means"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, unit_norm={self.unit_norm}"

    def _means(self, x: Tensor, assignment: Tensor, sizes: Tensor) -> Reduced:
        left = int(assignment.max()) + 1 if assignment.numel() else 0
        means = merged(x, assignment, left, sizes)
        if not self.unit_norm:
            return means
        alone = merged(x, assignment, left).sizes
        return means._replace(tokens=unit_means(means.tokens, alone))


class HierarchicalPooling(_ClusterMeans):
    """Means of the clusters of Ward's linkage on cosine distances: as few vectors as asked for, without training.

    `y_k = mean_{n in k} x_n`, over the at most `n / factor` clusters of the tree. Sizes weigh the means.

    Args:
        factor, tokens, fraction, rounding: how many are left, as `cenote.reduce.Budget`; fewer where vectors are equal.
        unit_norm: bring means back to unit length, as late interaction needs for its best scores; the paper leaves them as
            they are.
        variant: whose distances, see `cenote.reduce.VARIANTS`: `"colbert"` puts tokens together that are alike in their
            distances to all others.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> HierarchicalPooling(factor=2)(x).assignment.tolist()
        [[0, 1, 0, 1]]

    Source:
        Clavié, Chaffin, Adams 2024, "Reducing the Footprint of Multi-Vector Retrieval with Minimal Performance Impact via
        Token Pooling", arXiv 2409.14683.

    Note:
        The paper's means are not of unit length (`unit_norm=False`), and [CLS] is protected there: give `protect=1`.
    """

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        unit_norm: bool = True,
        variant: str = "pylate",
    ) -> None:
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding, unit_norm=unit_norm)
        self.rows = variant_of(variant).rows

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        assignment = torch.full(mask.shape, -1, dtype=torch.long)
        counts = self.budget.of(mask.sum(1)).tolist()
        for item, (real, count) in enumerate(zip(mask.cpu(), counts, strict=True)):
            own = real.nonzero().squeeze(1)
            if count == len(own):
                assignment[item, own] = torch.arange(count)
                continue
            unit = torch.nn.functional.normalize(x[item, own.to(x.device)].detach(), dim=-1)
            assignment[item, own] = torch.from_numpy(cut(ward_tree(cosine_distances(unit), rows=self.rows), count))
        return self._means(x, assignment.to(x.device), sizes)

    def documents(
        self, documents: Bags, factors: Sequence[float] | None = None, protect: int = 0
    ) -> dict[float, tuple[Bags, tuple[Tensor, ...]]]:
        """Documents of unit vectors, cut by several factors: one tree each, however many factors there are.

        Args:
            documents: `[tokens, dim]` each.
            factors: None for the reducer's own.
            protect: first tokens of each that stay as they are.

        Returns:
            For each factor the pooled documents, in the order of their first originals, and the assignment of each.
        """
        require_at_least(0, protect=protect)
        own = self.budget.factor
        budgets = {
            f: Budget(factor=f, rounding=self.budget.rounding) for f in factors or ([] if own is None else [own])
        }
        found: dict[float, tuple[list[Tensor], list[Tensor]]] = {f: ([], []) for f in budgets}
        for document in documents:
            free = document[protect:]
            tree = None
            for factor, budget in budgets.items():
                count = int(budget.of(torch.tensor([len(free)])))
                if count >= len(free):
                    labels = torch.arange(len(free))
                else:
                    if tree is None:
                        wide = free.detach().float() if free.dtype in (torch.float16, torch.bfloat16) else free.detach()
                        tree = ward_tree(cosine_distances(torch.nn.functional.normalize(wide, dim=-1)), rows=self.rows)
                    labels = _by_first(torch.from_numpy(cut(tree, count)))
                kept = min(protect, len(document))
                assignment = torch.cat([torch.arange(kept), labels + kept]).to(document.device)
                one = torch.ones(1, len(document), dtype=document.dtype, device=document.device)
                vectors, assignments = found[factor]
                vectors.append(self._means(document[None], assignment[None], one).tokens[0])
                assignments.append(assignment)
        return {f: (Bags.from_list(vectors), tuple(assignments)) for f, (vectors, assignments) in found.items()}


class KMeansPooling(_ClusterMeans):
    """Means of the clusters of cosine k-means, from centres that are random tokens of the set.

    Args:
        factor, tokens, fraction, rounding: how many are left; fewer where a centre is nobody's nearest.
        unit_norm: bring means back to unit length.
        iterations: of Lloyd's algorithm, at most.
        seed: of the first centres.

    Example:
        >>> KMeansPooling(tokens=1)(torch.ones(1, 3, 2)).sizes.tolist()
        [[3.0]]

    Source:
        Clavié, Chaffin, Adams 2024, arXiv 2409.14683.
    """

    order_matters = True

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        unit_norm: bool = True,
        iterations: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding, unit_norm=unit_norm)
        require_at_least(1, iterations=iterations)
        self.iterations, self.seed = iterations, seed

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        counts = self.budget.of(mask.sum(1))
        found = cosine_kmeans(x, counts, mask, iterations=self.iterations, seed=self.seed)
        own = mask.cumsum(1) - 1
        return self._means(x, torch.where((counts == mask.sum(1))[:, None] & mask, own, found), sizes)


class SequentialPooling(_ClusterMeans):
    """Means of tokens that follow each other: as many groups as asked for, each of as many tokens as can be.

    Args:
        factor, tokens, fraction, rounding: how many groups. With a factor each group has that many tokens and the last may be
            smaller, as in the paper, so that there may be one group more than `rounding` says.
        unit_norm: bring means back to unit length.

    Example:
        >>> SequentialPooling(factor=2, unit_norm=False)(torch.arange(5.0).view(1, 5, 1)).tokens.flatten().tolist()
        [0.5, 2.5, 4.0]

    Source:
        Clavié, Chaffin, Adams 2024, arXiv 2409.14683.
    """

    counts = "free"
    order_matters = True

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        own = (mask.cumsum(1) - 1).clamp(min=0)
        if self.budget.factor is not None:
            assignment = sequential_labels(mask.shape[1], self.budget.factor).to(x.device)[own]
        else:
            lengths = mask.sum(1, keepdim=True)
            assignment = own * self.budget.of(lengths.squeeze(1))[:, None] // lengths.clamp(min=1)
        return self._means(x, assignment.masked_fill(~mask, -1), sizes)


def _by_first(labels: Tensor) -> Tensor:
    """The same clusters, numbered in the order in which they first come."""
    first = torch.full((int(labels.max()) + 1,), len(labels)).scatter_reduce(
        0, labels, torch.arange(len(labels)), "amin"
    )
    return first.argsort().argsort()[labels]
