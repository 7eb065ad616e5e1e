"""The matrix of all pairs: who differs from whom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cenote.compare import Comparison, PairTest
from cenote.compare.statistics import SIGNIFICANT


@dataclass(frozen=True)
class Cell:
    """Row minus column.

    Attributes:
        strength: share of the largest difference in the matrix, in percent; 0 where it is not significant.
    """

    test: PairTest
    significant: bool
    strength: int


@dataclass(frozen=True)
class Matrix:
    """Rows and columns by rank; `None` on the diagonal and for pairs that were not tested.

    Attributes:
        significant: pairs that differ.
        tested: all pairs.
        least_p: the smallest p that Holm's correction can leave with so many pairs, groups and random draws; 0 where unknown.
    """

    names: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    significant: int
    tested: int
    least_p: float

    @property
    def beyond_reach(self) -> bool:
        """Whether no pair could be significant, however large its difference."""
        return self.least_p > SIGNIFICANT


def matrix(c: Comparison[Any]) -> Matrix | None:
    """All pairs both ways; `None` where there is no pair."""
    if not c.pairs:
        return None
    tests = {(t.first, t.second): t for t in c.pairs}
    tests |= {(t.second, t.first): t.seen_from(t.second) for t in c.pairs}
    names = tuple(r.method for r in c.results)
    largest = max((abs(t.difference) for t in c.pairs if math.isfinite(t.difference)), default=0.0) or 1.0

    def cell(test: PairTest | None) -> Cell | None:
        if test is None:
            return None
        real = test.p_adjusted <= SIGNIFICANT and math.isfinite(test.difference)
        return Cell(test, real, round(20 + 60 * abs(test.difference) / largest) if real else 0)

    cells = tuple(tuple(cell(tests.get((a, b))) for b in names) for a in names)
    least = len(c.pairs) * _least_p(c.provenance)
    return Matrix(names, cells, sum(t.p_adjusted <= SIGNIFICANT for t in c.pairs), len(c.pairs), least)


def _least_p(provenance: Mapping[str, Any]) -> float:
    """Of one test."""
    if resamples := provenance.get("bootstrap_resamples"):
        # by a version that drew units with replacement; Wilcoxon's p has no such bound
        return 0.0 if provenance.get("significance") == "wilcoxon" else 2 / (resamples + 1)
    groups, flips = provenance.get("groups"), provenance.get("flips")
    return 0.0 if groups is None or flips is None else max(2.0 ** (1 - groups), 1 / (flips + 1))
