"""Which words of a text carry its explanation: searches over the scores of one text.

Source: Feldhus et al., "Saliency Map Verbalization" (2023), arXiv 2210.07222.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import numpy as np

from cenote.core import InputError
from cenote.core.requirements import require_one_of, require_positive

Metric = Literal["mean", "quantile", "variance"]
Sign = Literal["+", "-"]


class Snippet(NamedTuple):
    """Words of a text that stand out together: their places, the mean of their normalised scores, and their coverage."""

    indices: tuple[int, ...]
    value: float
    coverage: float


def normalised(scores: Sequence[float]) -> list[float]:
    """`a / |max a|`; as they are where the maximum is 0, or there is none.

    >>> normalised([1.0, -4.0, 2.0])
    [0.5, -2.0, 1.0]
    """
    largest = abs(max(scores, default=0.0))
    return [a / largest for a in scores] if largest else list(scores)


def threshold(scores: Sequence[float], metric: Metric = "mean", value: float = 0.4) -> float:
    """What the mean of a snippet must pass.

    Args:
        scores: normalised.
        metric: `"mean"`: mean of the largest `value` of all scores, at least of one; `"quantile"` (a historical name):
            `value` standard deviations; `"variance"`: `value` variances of the population.
        value: see `metric`.

    >>> threshold([1.0, 0.5, 0.0, 0.0, 0.0], value=0.4)
    0.75
    """
    require_one_of(get_args(Metric), metric=metric)
    require_positive(value=value)
    if not scores:
        return 0.0
    if metric == "mean":
        largest = sorted(scores, reverse=True)[: max(1, int(len(scores) * value))]
        return sum(largest) / len(largest)
    return value * float(np.std(scores) if metric == "quantile" else np.var(scores))


def coverage(indices: Iterable[int], scores: Sequence[float]) -> float:
    """Share of all positive scores that these words have; of disjoint sets it adds. 0 where no score is positive.

    >>> coverage([0], [1.0, 3.0, -2.0])
    0.25
    """
    positive = sum(a for a in scores if a > 0)
    return sum(scores[i] for i in indices) / positive if positive > 0 else 0.0


def convolution_search(
    scores: Sequence[float],
    length: int = 5,
    metric: Metric = "mean",
    value: float = 0.4,
    sign: Sign | None = None,
    legacy: bool = False,
) -> list[Snippet]:
    """All sets of 2 to `length - 2` words inside a window of `length` whose mean passes the threshold, best first.

    Args:
        scores: of one text.
        length: of the window.
        metric, value: see `threshold`.
        sign: `"+"`: none of the words has a score below 0; `"-"`: all of them speak against the prediction, and how much is
            compared.
        legacy: as the authors' code: without the last window, with no set found for `"-"`, ordered by places from the back.
    """
    _require_length(length)
    filters = [f for ones in range(2, length - 1) for f in combinations(range(length), ones)]
    return _searched(scores, filters, length, metric, value, sign, legacy)


def span_search(
    scores: Sequence[float],
    length: int = 5,
    metric: Metric = "mean",
    value: float = 0.4,
    sign: Sign | None = None,
    legacy: bool = False,
) -> list[Snippet]:
    """All runs of 3, 5, ... up to `length` words whose mean passes the threshold.

    Args:
        scores: of the words.
        length, metric, value, sign, legacy: as of `convolution_search`.

    A run shorter than the window is searched for in its middle in the authors' code, which never looks at the first and last
    words (`legacy`); here wherever it fits.
    """
    _require_length(length)
    if legacy:
        middle = length // 2
        runs = range(3, length + 1, 2)
        filters = [tuple(range(middle - n // 2, middle + n // 2 + 1)) for n in runs]
    else:
        filters = [tuple(range(start, start + n)) for n in range(3, length + 1, 2) for start in range(length - n + 1)]
    return _searched(scores, filters, length, metric, value, sign, legacy)


def total_order(scores: Sequence[float]) -> list[Snippet]:
    """Each word alone, largest score first, first ones first among equals."""
    a = normalised(scores)
    order = sorted(range(len(a)), key=lambda i: -a[i])
    return [Snippet((i,), a[i], coverage([i], a)) for i in order]


def compare_searches(*found: Sequence[Snippet]) -> list[Snippet]:
    """The snippets of the first search that every other search has found too."""
    if not found:
        raise InputError("found: expected at least one search")
    return [s for s in found[0] if all(s.indices in {t.indices for t in other} for other in found[1:])]


def summary_search(
    convolution: Sequence[Snippet],
    spans: Sequence[Snippet],
    scores: Sequence[float],
    best: int = 5,
    least: float = -np.inf,
    legacy: bool = False,
) -> list[Snippet]:
    """The spans that carry most: the best snippets and words, joined where they touch; those in the upper quartile, best first.

    Args:
        convolution, spans: what these searches found.
        scores: of the text.
        best: how many of each search, and of single words.
        least: normalised score of a word at which a span may begin and end: what is below stands in between only.
        legacy: as the authors' code: sums leave out the last word of a span, so that single words have none, spans begin and
            end anywhere, and of spans with the same coverage only the last is kept.
    """
    a = normalised(scores)
    positive = sum(x for x in a if x > 0)
    if positive <= 0:
        return []

    def sums(indices: Sequence[int]) -> float:
        last = indices[-1] if legacy else indices[-1] + 1
        return max(sum(a[indices[0] : last]) / positive, 0.0)

    def own(indices: Sequence[int]) -> float:
        return sums(indices) if legacy else max(coverage(indices, a), 0.0)

    singles = [(i,) for i in range(len(a)) if legacy or a[i] > 0]
    chosen: set[int] = set()
    for search in ([s.indices for s in convolution], [s.indices for s in spans], singles):
        for indices in sorted(search, key=own, reverse=True)[:best]:
            chosen.update(indices)
    runs: list[list[int]] = []
    for i in sorted(chosen):
        if runs and runs[-1][-1] + 1 == i:
            runs[-1].append(i)
        else:
            runs.append([i])
    if not legacy:
        runs = [r for r in (_trimmed(run, lambda i: a[i] >= least and a[i] > 0) for run in runs) if r]
    if not runs:
        return []
    of = [sums(run) for run in runs]
    quartile = float(np.quantile(of, 0.75))
    kept = [Snippet(tuple(r), sum(a[i] for i in r) / len(r), c) for r, c in zip(runs, of, strict=True) if c >= quartile]
    if legacy:
        kept = list({s.coverage: s for s in kept}.values())
    return sorted(kept, key=lambda s: -s.coverage)


def _searched(
    scores: Sequence[float],
    filters: Sequence[tuple[int, ...]],
    length: int,
    metric: Metric,
    value: float,
    sign: Sign | None,
    legacy: bool,
) -> list[Snippet]:
    if sign is not None:
        require_one_of(get_args(Sign), sign=sign)
    a = normalised(scores)
    against = sign == "-" and not legacy
    judged = normalised([-x for x in scores]) if against else a
    least = threshold(judged, metric, value)
    found: dict[tuple[int, ...], float] = {}
    for start in range(len(a) - length + (0 if legacy else 1)):
        for places in filters:
            indices = tuple(start + i for i in places)
            picked = [judged[i] for i in indices]
            mean = sum(picked) / len(picked)
            if mean > least and _of_sign(picked, sign, legacy, whole=len(places) == length):
                found.setdefault(indices, mean)
    snippets = [Snippet(i, m, coverage(i, a)) for i, m in found.items()]
    if legacy:
        return sorted(snippets, key=lambda s: s.indices, reverse=True)
    return sorted(snippets, key=lambda s: (-s.value, s.indices))


def _of_sign(picked: Sequence[float], sign: Sign | None, legacy: bool, whole: bool) -> bool:
    if sign is None:
        return True
    if sign == "+":
        return all(x >= 0 for x in picked)
    # in the authors' code the zeros of a filter are no numbers below 0
    return whole and all(x < 0 for x in picked) if legacy else all(x > 0 for x in picked)


def _trimmed(run: list[int], stands_out: Callable[[int], bool]) -> list[int]:
    at = [i for i in run if stands_out(i)]
    return [i for i in run if at[0] <= i <= at[-1]] if at else []


def _require_length(length: int) -> None:
    if length < 3 or length % 2 == 0:
        raise InputError(f"length: expected an odd number of words from 3, got {length}")
