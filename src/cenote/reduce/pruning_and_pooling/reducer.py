"""The policy as a reducer, for any block of any model, and its places in a vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.clusters import bipartite_clusters
from cenote.core.errors import InputError
from cenote.core.reduced import Reduced, merged
from cenote.reduce.base import BudgetReducer
from cenote.reduce.basic.controls import largest
from cenote.reduce.pruning_and_pooling.policy import importance, reductions, score_variance

BLOCKS = (3, 6, 9)
OFF_THE_SHELF = 7e-5
FINE_TUNING = 6e-5


class Decision(NamedTuple):
    """What was seen of each set and decided: `scores` `[batch, tokens]`, their `variance` `[batch]`, and whether it was pooled,
    `pool` `[batch]`."""

    scores: Float[Tensor, "batch tokens"]
    variance: Float[Tensor, "batch"]
    pool: Bool[Tensor, "batch"]


class PruneOrPool(BudgetReducer):
    """Of each set the least important tokens dropped, or the most similar ones merged, by how much importance varies.

    `s_i ~ sum_h A_hi |v_i|` with a sum of 1; below the threshold their variance says that nothing is clearly of no importance,
    so that like tokens are merged: every second one into its most similar of the others, by the keys' mean over heads. Else
    the tokens of least score go. Either way as many are left. `inf` always pools, `-inf` always prunes.

    Args:
        factor, tokens, fraction, rounding: how many are left, as `cenote.reduce.Budget`.
        threshold: of the variance of scores: 7e-5 off the shelf at 196 tokens, 6e-5 when fine-tuning.
        normalised: let the threshold be one of the squared coefficient of variation, which does not shrink with the number of
            tokens.
        by_values: whether scores know the lengths of values; else they are the attention alone.

    Example:
        >>> x, signal = torch.rand(1, 8, 4), torch.rand(1, 2, 8, 4)
        >>> reducer = PruneOrPool(factor=2, threshold=float("inf"))
        >>> reducer(x, attention=torch.rand(1, 2, 8), keys=signal, values=signal).sizes.sum()
        tensor(8.)

    Source:
        Wu et al. 2023, "PPT: Token Pruning and Pooling for Efficient Vision Transformers", arXiv 2310.01812.

    Note:
        The paper's block merges half of the tokens at most; where fewer are to be left, what is merged is matched again.
        Behind a block (`cenote.models.live.Shorten`) the block's own MLP has run on all tokens; `cenote.reduce.ReducibleViT`
        reduces before it, as the paper does.
    """

    needs = frozenset({"attention", "keys", "values"})
    keeps: Literal["members", "means", "directions"] = "means"
    order_matters = True
    rows = "first"

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
        threshold: float = OFF_THE_SHELF,
        normalised: bool = False,
        by_values: bool = True,
    ) -> None:
        super().__init__(factor=factor, tokens=tokens, fraction=fraction, rounding=rounding)
        if threshold != threshold:
            raise InputError(f"threshold: expected a number, inf or -inf, got {threshold}")
        self.threshold, self.normalised, self.by_values = threshold, normalised, by_values
        self._log: list[Decision] | None = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}"

    def decide(
        self,
        attention: Float[Tensor, "batch heads tokens"],
        values: Float[Tensor, "batch kv_heads tokens width"],
        mask: Bool[Tensor, "batch tokens"],
    ) -> Decision:
        """Whether each set is pooled, and why."""
        scores = importance(attention, values if self.by_values else None, mask)
        variance = score_variance(scores, mask, normalised=self.normalised)
        return Decision(scores, variance, self.pools(variance))

    def pools(self, variance: Float[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
        """Which sets are pooled, by the variance of their scores."""
        return variance < self.threshold

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        attention: Float[Tensor, "batch heads tokens"],
        keys: Float[Tensor, "batch kv_heads tokens width"],
        values: Float[Tensor, "batch kv_heads tokens width"],
    ) -> Reduced:
        counts = self.budget.of(mask.sum(1))
        decision = self.decide(attention.detach(), values.detach(), mask)
        if self._log is not None:
            self._log.append(decision)
        kept = largest(decision.scores, counts, mask)
        assignment = torch.where(kept, kept.cumsum(1) - 1, -1)
        if bool(decision.pool.any()):
            pooled = bipartite_clusters(keys.mean(1), counts, mask, sizes)
            assignment = torch.where(decision.pool[:, None], pooled, assignment)
        return merged(x, assignment, int(counts.max()) if counts.numel() else 0, sizes)

    def multiply_adds(self, tokens: int, left: int, dim: int) -> int:  # noqa: ARG002
        """At most: similarities of one half of the tokens with the other, and the lengths of values."""
        return (tokens // 2) * ((tokens + 1) // 2) * dim + tokens * dim


def ppt(
    patches: int,
    *,
    blocks: Sequence[int] = BLOCKS,
    r: int | Sequence[int] | tuple[int, float] = 50,
    threshold: float | Sequence[float] = OFF_THE_SHELF,
    normalised: bool = False,
    by_values: bool = True,
) -> dict[int, PruneOrPool]:
    """Where and how much the paper reduces: what `ReducibleViT.run(images, at=...)` and `models.live.shortened` take.

    Args:
        patches: tokens of an image besides [CLS].
        blocks: those that reduce, from 0.
        r: how many tokens go in each, as `reductions`.
        threshold: of the variance, one for all or one for each; `[inf, -inf, -inf]` is fixed by depth.
        normalised, by_values: as `PruneOrPool`.

    Example:
        >>> [f"{block}: {reducer.budget.tokens}" for block, reducer in ppt(196).items()]
        ['3: 146', '6: 96', '9: 48']
        >>> [reducer.threshold for reducer in ppt(196, threshold=[float("inf"), 7e-5, 7e-5]).values()]
        [inf, 7e-05, 7e-05]

    Source:
        Wu et al. 2023, arXiv 2310.01812.
    """
    places = sorted(blocks)
    thresholds = [threshold] * len(places) if isinstance(threshold, int | float) else list(threshold)
    if len(thresholds) != len(places):
        raise InputError(f"threshold: {len(thresholds)} numbers for {len(places)} blocks")
    found = {}
    for block, gone, limit in zip(places, reductions(r, len(places), patches + 1), thresholds, strict=True):
        patches -= gone
        found[block] = PruneOrPool(tokens=patches, threshold=limit, normalised=normalised, by_values=by_values)
    return found


@contextmanager
def watched(reducers: Mapping[int, PruneOrPool]) -> Iterator[dict[int, Decision]]:
    """What is decided in each block, of all that runs in here; there to read on leaving.

    The variance per block, and the share that was pooled (`decisions[block].pool.float().mean()`).
    """
    found: dict[int, Decision] = {}
    for reducer in reducers.values():
        reducer._log = []
    try:
        yield found
    finally:
        for block, reducer in reducers.items():
            log, reducer._log = reducer._log or [], None
            if log:
                found[block] = Decision(*(torch.cat(parts) for parts in zip(*log, strict=True)))


@torch.no_grad()
def set_thresholds(reducers: Mapping[int, PruneOrPool], run: Callable[[], object]) -> dict[int, float]:
    """Set each block's threshold to the median variance of given data, so that half of these are pooled there.

    Args:
        reducers: by block; what one does changes what later ones see, so that they are set in their order.
        run: runs the data through the model with these reducers.

    Returns:
        The thresholds.
    """
    for block in sorted(reducers):
        with watched(reducers) as seen:
            run()
        if block not in seen:
            raise InputError(f"run: nothing came to the reducer of block {block}")
        reducers[block].threshold = float(seen[block].variance.double().quantile(0.5))
    return {block: reducer.threshold for block, reducer in reducers.items()}
