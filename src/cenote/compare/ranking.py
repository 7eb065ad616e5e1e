"""Retrieval and similarity by task, and whether one model beats another over many tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from cenote.compare.statistics import signed_rank_p
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least


def reciprocal_ranks(
    similarity: Float[ndarray, "queries items"], relevance: Float[ndarray, "queries items"], k: int | None = None
) -> Float[ndarray, "queries"]:
    """`1 / rank` of the first relevant item of each query; 0 where none is relevant. Their mean is MRR.

    Of equally similar items the less relevant come first, so that a constant finds nothing.

    Args:
        similarity: of each query to each item.
        relevance: above 0 where it answers.
        k: depth, below which nothing is found; default: all.

    >>> reciprocal_ranks(np.array([[0.1, 0.9, 0.5]]), np.array([[0.0, 0.0, 1.0]])).tolist()
    [0.5]
    """
    return first_found(_in_order(similarity, relevance), k)


def ndcg(
    similarity: Float[ndarray, "queries items"], relevance: Float[ndarray, "queries items"], k: int = 10
) -> Float[ndarray, "queries"]:
    """nDCG of each query among its first `k` items: `sum_r rel_r / log2(r + 1)` over the best that it could be.

    Args:
        similarity: of each query to each item.
        relevance: gains, 0 where an item does not answer; a query without any counts 0.
        k: depth.

    >>> ndcg(np.array([[0.1, 0.9]]), np.array([[1.0, 0.0]])).round(4).tolist()
    [0.6309]
    """
    return gained(_in_order(similarity, relevance), relevance, k)


def recall(
    similarity: Float[ndarray, "queries items"], relevance: Float[ndarray, "queries items"], k: int = 10
) -> Float[ndarray, "queries"]:
    """Share of each query's relevant items that are among its first `k`; 0 where none is relevant.

    >>> recall(np.array([[0.9, 0.5, 0.1]]), np.array([[1.0, 0.0, 1.0]]), k=2).tolist()
    [0.5]
    """
    return found_share(_in_order(similarity, relevance), relevance, k)


def first_found(gains: Float[ndarray, "queries found"], k: int | None = None) -> Float[ndarray, "queries"]:
    """`reciprocal_ranks` of gains that stand in the order in which items were found.

    >>> first_found(np.array([[0.0, 0.0, 1.0]])).round(3).tolist(), first_found(np.array([[0.0, 0.0, 1.0]]), k=2).tolist()
    ([0.333], [0.0])
    """
    if k is not None:
        require_at_least(1, k=k)
    answers = gains[:, :k] > 0
    if not answers.shape[1]:
        return np.zeros(len(gains))
    return np.where(answers.any(1), 1 / (answers.argmax(1) + 1), 0.0)


def gained(
    gains: Float[ndarray, "queries found"], relevant: Float[ndarray, "queries judged"], k: int = 10
) -> Float[ndarray, "queries"]:
    """`ndcg` of gains that stand in the order in which items were found.

    Args:
        gains: of what was found, at least the first `k`.
        relevant: of all that could be found, in any order, zeros among them.
        k: depth.

    >>> gained(np.array([[0.0, 2.0]]), np.array([[2.0, 1.0, 0.0]])).round(4).tolist()
    [0.4796]
    """
    require_at_least(1, k=k)
    first, best = np.maximum(gains[:, :k], 0), -np.sort(-np.maximum(relevant, 0), axis=1)[:, :k]
    found, most = (np.asarray(side @ _discount(side.shape[1]), dtype=np.float64) for side in (first, best))
    return np.divide(found, most, out=np.zeros_like(found), where=most > 0)


def found_share(
    gains: Float[ndarray, "queries found"], relevant: Float[ndarray, "queries judged"], k: int = 10
) -> Float[ndarray, "queries"]:
    """`recall` of gains that stand in the order in which items were found; `relevant` as for `gained`.

    >>> found_share(np.array([[0.0, 2.0]]), np.array([[2.0, 1.0, 0.0]])).tolist()
    [0.5]
    """
    require_at_least(1, k=k)
    found, all_there = (gains[:, :k] > 0).sum(1), (relevant > 0).sum(1)
    return np.divide(found, all_there, out=np.zeros(len(gains)), where=all_there > 0)


def _discount(depth: int) -> ndarray:
    return 1 / np.log2(np.arange(depth) + 2)


def spearman(found: Float[ndarray, "pairs"], truth: Float[ndarray, "pairs"]) -> float:
    """Rank correlation of similarities with what people say of the same pairs; 0 where one of both is constant.

    >>> spearman(np.array([0.1, 0.4, 0.9]), np.array([1.0, 5.0, 4.0]))
    0.5
    """
    import scipy.stats

    if np.ptp(found) == 0 or np.ptp(truth) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(found, truth).statistic)


class SignedRank(NamedTuple):
    """Two models over the same tasks.

    Attributes:
        p: of Wilcoxon's signed-rank test, two-sided.
        effect: matched-pairs rank-biserial correlation, from -1 (the second is better everywhere) to 1.
        difference: median over the tasks, first minus second.
        tasks: number of tasks.
    """

    p: float
    effect: float
    difference: float
    tasks: int


def over_tasks(first: Mapping[str, float], second: Mapping[str, float]) -> SignedRank:
    """Whether one model beats another over many tasks, each one number: the paper's judgement of embeddings.

    Args:
        first, second: from the name of a task to its score.

    Raises:
        InputError: where they are of other tasks, or there is none.

    >>> over_tasks({"a": 0.5, "b": 0.7, "c": 0.6}, {"a": 0.4, "b": 0.5, "c": 0.65}).effect.__round__(3)
    0.667
    """
    import scipy.stats

    if first.keys() != second.keys() or not first:
        raise InputError(
            f"second: expected the tasks {', '.join(first) or 'of first, at least one'}, got {', '.join(second)}"
        )
    d = np.array([first[task] - second[task] for task in first])
    differ = d[np.round(d, 12) != 0]
    ranks = scipy.stats.rankdata(np.round(np.abs(differ), 12))
    effect = float((ranks * np.sign(differ)).sum() / ranks.sum()) if len(differ) else 0.0
    return SignedRank(signed_rank_p(d), effect, float(np.median(d)), len(d))


def _in_order(similarity: ndarray, relevance: ndarray) -> ndarray:
    if similarity.shape != relevance.shape:
        raise InputError(f"relevance: expected shape {similarity.shape} as similarity, got {relevance.shape}")
    order = np.lexsort((relevance, -similarity), axis=1)
    return np.take_along_axis(relevance, order, 1)
