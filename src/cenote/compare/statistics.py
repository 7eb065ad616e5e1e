"""Which differences are real: a paired bootstrap over test items, Wilcoxon's test and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from cenote.compare.metrics import Metric

Significance = Literal["bootstrap", "wilcoxon"]
"""Where p-values come from."""

RESAMPLES = 9999
RESAMPLES_PER_PAIR = 80
CHUNK_ELEMENTS = 4_000_000


def resampled_metrics(
    metric: Metric,
    scores: Sequence[Float[ndarray, "seeds items *outputs"]],
    y: ndarray | None,
    groups: Int[ndarray, "items"],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[ndarray, "methods resamples"]:
    """The metric of each method, mean over its seeds, on the same bootstrap resamples of the test items.

    Whole groups are drawn with replacement; items that are their own group give the ordinary bootstrap. All methods see the
    same draws, so differences are paired.
    """
    rng = np.random.default_rng(seed)
    count = int(groups.max()) + 1
    out = np.empty((len(scores), resamples))
    step = max(1, CHUNK_ELEMENTS // max(len(groups), count))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        draws = rng.multinomial(count, np.full(count, 1 / count), size=size)
        # in the memory items come first, for metrics that take the items in another order
        weights = np.ascontiguousarray(draws.T[groups], dtype=np.float64).T

        def judged(m: int, start: int = start, size: int = size, weights: ndarray = weights) -> None:
            out[m, start : start + size] = np.mean([metric(s, y, weights) for s in scores[m]], 0)

        # numpy lets go of the interpreter
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(judged, range(len(scores))))
    return out


def resamples_for(methods: int) -> int:
    """Enough that the smallest p-value, `2 / (resamples + 1)`, stays significant when Holm corrects over all pairs.

    >>> resamples_for(3), resamples_for(32)
    (9999, 39680)
    """
    return max(RESAMPLES, RESAMPLES_PER_PAIR * methods * (methods - 1) // 2)


def interval(values: Float[ndarray, "resamples"]) -> tuple[float, float]:
    """The central 95 % of bootstrap values; resamples without a defined metric are left out."""
    # where every resample has a metric, the quicker of the two gives the same
    percentile = np.nanpercentile if np.isnan(values).any() else np.percentile
    low, high = percentile(values, [2.5, 97.5])
    return float(low), float(high)


def two_sided_p(differences: Float[ndarray, "resamples"]) -> float:
    """How often the bootstrap difference falls on the other side of zero, doubled; never below `2 / (resamples + 1)`."""
    undefined = np.isnan(differences)
    d = differences[~undefined] if undefined.any() else differences
    tail = min(int((d <= 0).sum()), int((d >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(d) + 1))


def signed_rank_p(differences: Float[ndarray, "pairs"]) -> float:
    """Wilcoxon's signed-rank test, two-sided: are paired differences as often and as far above zero as below?

    Pairs without a difference are left out, as Wilcoxon did.

    >>> round(signed_rank_p(np.array([0.3, 0.1, 0.4, 0.2, 0.5, 0.6])), 4)
    0.0312
    """
    import scipy.stats

    d = differences[np.isfinite(differences)]
    if not d.any():
        return 1.0
    # 0.6 - 0.4 and 0.4 - 0.2 are the same difference, though not the same floating-point number
    d = np.round(d / np.abs(d).max(), 9)
    return float(scipy.stats.wilcoxon(d[d != 0]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p-values.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
