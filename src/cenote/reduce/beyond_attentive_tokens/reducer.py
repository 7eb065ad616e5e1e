"""Attentive tokens matched, inattentive ones clustered, at a total that is known beforehand.

Source: Long et al. 2023, arXiv 2211.11315.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.clusters import bipartite_matching, density_peaks, greedy_pairs, numbered, squared_distances
from cenote.core.errors import InputError
from cenote.core.reduced import Reduced, merged
from cenote.core.requirements import require_at_least, require_one_of
from cenote.reduce.base import Budget, BudgetReducer
from cenote.reduce.basic.controls import largest

BLOCKS = (3, 6, 9)
"""The paper's 4, 7 and 10, from 0."""


class Split(NamedTuple):
    """How a total is made up, per set: of the most attentive tokens, `attentive` before `pairs` of them are merged, and
    `clusters` of the others; `attentive - pairs + clusters` are left."""

    attentive: Int[Tensor, "batch"]
    pairs: Int[Tensor, "batch"]
    clusters: Int[Tensor, "batch"]


def budget_split(
    left: Int[Tensor, "batch"], tokens: Int[Tensor, "batch"], *, clusters: float = 0.25, pairs: float = 0.1
) -> Split:
    """Of how many are left in all, how many are attentive, merged pairs, and clusters of the others.

    Args:
        left: the total, merged tokens included, at most the tokens.
        tokens: that there are.
        clusters: share of the total that are clusters of inattentive tokens, at least one of them.
        pairs: share of the attentive tokens that are merged away.

    Example:
        >>> [part.item() for part in budget_split(torch.tensor([98]), torch.tensor([196]))]
        [82, 8, 24]
        >>> [part.item() for part in budget_split(torch.tensor([7]), torch.tensor([7]))]
        [5, 0, 2]
    """
    for name, share, most in (("clusters", clusters, 1), ("pairs", pairs, 0.5)):
        if not 0 <= share <= most:
            raise InputError(f"{name}: expected a share from 0 to {most}, got {share}")
    groups = (left * clusters).round().long().clamp(min=1).minimum(left)
    kept = left - groups
    attentive = (kept / (1 - pairs)).round().long()
    # an inattentive token is left for each cluster, and no more pairs than there are
    attentive = attentive.minimum(tokens - groups).minimum(2 * kept)
    return Split(attentive, attentive - kept, groups)


class AttentiveAndDiverse(BudgetReducer):
    """What [CLS] attends to, without its doubles, and a few means of all else: BAT.

    The `n_att` tokens of largest attention, of which the `n_pair` most similar pairs are merged; the others, around `n_clu`
    density peaks. Means weigh tokens by their attention. `n_att - n_pair + n_clu` are left, of every set.

    Args:
        factor, tokens, fraction, rounding: how many are left in all, as `cenote.reduce.Budget`.
        clusters: share of these that are clusters of inattentive tokens.
        pairs: share of the attentive tokens that are merged away.
        split: `(n_att, n_pair, n_clu)` instead of all of the above; where there are no more than `n_clu` inattentive tokens
            they are kept as they are.
        neighbours: `k` of the density.
        matching: `"greedy"`: each token is in one pair at most; `"bipartite"`: every second attentive token goes to its most
            similar one of the others, several to the same.

    Example:
        >>> x, attention = torch.rand(1, 8, 4), torch.rand(1, 2, 8)
        >>> AttentiveAndDiverse(factor=2)(x, attention=attention).sizes.sum()
        tensor(8.)

    Source:
        Long et al. 2023, "Beyond Attentive Tokens: Incorporating Token Importance and Diversity for Efficient Vision
        Transformers", CVPR, arXiv 2211.11315.

    Note:
        The authors released no code, and what their paper leaves open is inferred: the density, the shares, and the weights of
        means. Of two that are equally dense the first is denser, nothing is drawn.
    """

    mean_weights = "own"
    needs = frozenset({"attention"})
    rows = "first"

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        clusters: float = 0.25,
        pairs: float = 0.1,
        split: tuple[int, int, int] | None = None,
        neighbours: int = 5,
        matching: Literal["greedy", "bipartite"] = "greedy",
    ) -> None:
        require_one_of(("greedy", "bipartite"), matching=matching)
        require_at_least(1, neighbours=neighbours)
        if split is not None:
            attentive, paired, groups = split
            require_at_least(0, attentive=attentive, pairs=paired, clusters=groups)
            if 2 * paired > attentive or attentive - paired + groups < 1:
                raise InputError(
                    f"split: expected (attentive, pairs of them, clusters) that leave a token, got {split}"
                )
            if (factor, tokens, fraction) != (None, None, None):
                raise InputError("split: says how many are left; give no factor, tokens or fraction with it")
            tokens = attentive - paired + groups
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding)
        budget_split(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), clusters=clusters, pairs=pairs)
        self.clusters, self.pairs, self.given = clusters, pairs, split
        self.neighbours, self.matching = neighbours, matching
        self.order_matters = matching == "bipartite"
        if split is not None:
            self.counts: Literal["exact", "at most", "free"] = "at most"

    def split(self, tokens: Int[Tensor, "batch"]) -> Split:
        """How sets of so many tokens are split."""
        left = self.budget.of(tokens)
        if self.given is None:
            return budget_split(left, tokens, clusters=self.clusters, pairs=self.pairs)
        attentive = tokens.clamp(max=self.given[0])
        # a set that has no more than may be left is left as it is
        pairs = (attentive // 2).clamp(max=self.given[1]).masked_fill(left >= tokens, 0)
        groups = (tokens - attentive).minimum(torch.where(left < tokens, self.given[2], tokens))
        return Split(attentive, pairs, groups)

    def attentive(
        self, weights: Float[Tensor, "batch tokens"], counts: Int[Tensor, "batch"], mask: Bool[Tensor, "batch tokens"]
    ) -> Bool[Tensor, "batch tokens"]:
        """The tokens of largest attention."""
        return largest(weights, counts, mask)

    def matched(
        self, x: Float[Tensor, "batch tokens dim"], pairs: Int[Tensor, "batch"], mask: Bool[Tensor, "batch tokens"]
    ) -> Int[Tensor, "batch tokens"]:
        """What each attentive token is merged into."""
        if self.matching == "bipartite":
            left = mask & (mask.cumsum(1).remainder(2) == 0)
            return bipartite_matching(x, left, mask & ~left, pairs)
        unit = torch.nn.functional.normalize(x.detach(), dim=-1)
        return greedy_pairs(unit @ unit.transpose(1, 2), pairs, mask)

    def clustered(
        self, x: Float[Tensor, "batch tokens dim"], counts: Int[Tensor, "batch"], mask: Bool[Tensor, "batch tokens"]
    ) -> Int[Tensor, "batch tokens"]:
        """The cluster of each inattentive token."""
        distances = squared_distances(x, mask) / x.shape[2]
        return density_peaks(distances, counts, mask, neighbours=self.neighbours)[0]

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        attention: Float[Tensor, "batch heads tokens"],
    ) -> Reduced:
        weights, split = attention.detach().mean(1), self.split(mask.sum(1))
        attentive = self.attentive(weights, split.attentive, mask)
        others = mask & ~attentive
        singles = numbered(self.matched(x, split.pairs, attentive), attentive)
        groups = self.clustered(x, split.clusters, others)
        kept = (split.attentive - split.pairs)[:, None]
        assignment = torch.where(attentive, singles, torch.where(others, groups + kept, -1))
        left = int((split.attentive - split.pairs + split.clusters).max()) if len(x) else 0
        return merged(x, assignment, left, sizes, weights)

    def multiply_adds(self, tokens: int, left: int, dim: int) -> int:
        """Distances among inattentive tokens and similarities among attentive ones."""
        split = budget_split(torch.tensor([left]), torch.tensor([tokens]), clusters=self.clusters, pairs=self.pairs)
        attentive = int(split.attentive) if self.given is None else self.given[0]
        return (attentive**2 + (tokens - attentive) ** 2) * dim


def bat(
    patches: int, keep: float, *, blocks: Sequence[int] = BLOCKS, **settings: object
) -> dict[int, AttentiveAndDiverse]:
    """Where and how much the paper reduces: what `ReducibleViT.run(images, at=...)` and `models.live.shortened` take.

    Args:
        patches: tokens of an image besides [CLS].
        keep: share of them that each of the blocks leaves, merged ones included, rounded up.
        blocks: those that reduce, from 0.
        settings: of `AttentiveAndDiverse`.

    Example:
        >>> [reducer.budget.tokens for reducer in bat(196, 0.5).values()]
        [98, 49, 25]

    Source:
        Long et al. 2023, arXiv 2211.11315.
    """
    budget, found = Budget(fraction=keep, rounding="ceil"), {}
    for block in sorted(blocks):
        patches = int(budget.of(torch.tensor([patches])))
        found[block] = AttentiveAndDiverse(tokens=patches, **settings)  # type: ignore[arg-type]
    return found
