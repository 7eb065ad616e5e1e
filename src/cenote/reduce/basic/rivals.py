"""Published reductions that others are compared with."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.clusters import bipartite_clusters, density_peaks, squared_distances
from cenote.core.reduced import Reduced, merged
from cenote.core.requirements import require_at_least
from cenote.reduce.base import BudgetReducer
from cenote.reduce.basic.controls import largest


class BipartiteMerging(BudgetReducer):
    """Every second token merged into its most similar one of the others, the most similar pairs first: ToMe, in one place.

    Means weigh tokens by their sizes. One matching takes half of the tokens at most; where fewer are to be left, what is merged
    is matched again.

    Args:
        factor, tokens, fraction, rounding: how many are left, as `cenote.reduce.Budget`.

    Example:
        >>> x = torch.eye(2).repeat_interleave(2, 0)[None]
        >>> BipartiteMerging(factor=2)(x, keys=x[:, None]).assignment.tolist()
        [[0, 0, 1, 1]]

    Source:
        Bolya et al. 2023, "Token Merging: Your ViT But Faster", arXiv 2210.09461.

    Note:
        The paper merges some tokens in every block; here the block is chosen by who calls it.
    """

    needs = frozenset({"keys"})
    order_matters = True

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        keys: Float[Tensor, "batch kv_heads tokens width"],
    ) -> Reduced:
        assignment = bipartite_clusters(keys.mean(1), self.budget.of(mask.sum(1)), mask, sizes)
        return merged(x, assignment, int(assignment.max()) + 1 if len(x) else 0, sizes)

    def multiply_adds(self, tokens: int, left: int, dim: int) -> int:  # noqa: ARG002
        """At most: similarities of one half of the tokens with the other."""
        return (tokens // 2) * ((tokens + 1) // 2) * dim


class DensityPeaks(BudgetReducer):
    """Means of clusters around tokens that are dense and far from denser ones: DPC-kNN.

    `rho_i = exp(-mean_{j in kNN(i)} |x_i - x_j|^2 / C)`, `delta_i` the distance to the nearest denser token; tokens of largest
    `rho delta` are centres, each token goes to the nearest.

    Args:
        factor, tokens, fraction, rounding: how many are left.
        neighbours: `k` of the density.

    Example:
        >>> x = torch.tensor([[[0.0], [9.0], [0.1], [9.1]]])
        >>> DensityPeaks(tokens=2)(x).assignment.tolist()
        [[0, 1, 0, 1]]

    Source:
        Du, Ding, Jia 2016, "Study on density peaks clustering based on k-nearest neighbors and principal component analysis";
        in vision transformers by Zeng et al. 2022, arXiv 2204.08680.
    """

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        neighbours: int = 5,
    ) -> None:
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding)
        require_at_least(1, neighbours=neighbours)
        self.neighbours = neighbours

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Reduced:
        distances = squared_distances(x, mask) / x.shape[2]
        assignment, _ = density_peaks(distances, self.budget.of(mask.sum(1)), mask, neighbours=self.neighbours)
        return merged(x, assignment, int(assignment.max()) + 1 if len(x) else 0, sizes)

    def multiply_adds(self, tokens: int, left: int, dim: int) -> int:  # noqa: ARG002
        """Distances between all tokens."""
        return tokens**2 * dim


class FusedTopTokens(BudgetReducer):
    """The tokens that are attended to most, and one more: the mean of all others, by their attention. EViT.

    Args:
        factor, tokens, fraction, rounding: how many are left, the fused one included.

    Example:
        >>> attention = torch.tensor([[[0.1, 0.6, 0.3]]])
        >>> FusedTopTokens(tokens=2)(torch.arange(3.0).view(1, 3, 1), attention=attention).tokens.flatten().tolist()
        [1.5, 1.0]

    Source:
        Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        arXiv 2202.07800.

    Note:
        The paper's fused token is the sum by attentions that do not sum to 1; this is the mean.
    """

    mean_weights = "own"
    needs = frozenset({"attention"})
    rows = "first"

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        attention: Float[Tensor, "batch heads tokens"],
    ) -> Reduced:
        weights, counts = attention.detach().mean(1), self.budget.of(mask.sum(1))
        kept = largest(weights, counts - 1, mask)
        assignment = torch.where(kept, kept.cumsum(1) - 1, (counts - 1)[:, None]).masked_fill(~mask, -1)
        return merged(x, assignment, int(counts.max()) if counts.numel() else 0, sizes, weights)
