"""The matrix of all pairs: who differs from whom."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cenote.compare import PairTest
from cenote.jobs.probe.result import Comparison
from cenote.report.leaderboard import SIGNIFICANT


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
        least_p: the smallest p that Holm's correction can leave with so many pairs and resamples; 0 where unknown.
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


def matrix(c: Comparison) -> Matrix | None:
    """All pairs both ways; `None` where there is no pair."""
    if not c.pairs:
        return None
    tests = {(t.first, t.second): t for t in c.pairs}
    tests |= {(t.second, t.first): _turned(t) for t in c.pairs}
    names = tuple(r.method for r in c.results)
    largest = max((abs(t.difference) for t in c.pairs if math.isfinite(t.difference)), default=0.0) or 1.0

    def cell(test: PairTest | None) -> Cell | None:
        if test is None:
            return None
        real = test.p_adjusted <= SIGNIFICANT and math.isfinite(test.difference)
        return Cell(test, real, round(20 + 60 * abs(test.difference) / largest) if real else 0)

    cells = tuple(tuple(cell(tests.get((a, b))) for b in names) for a in names)
    # Wilcoxon's p has no such bound
    resamples = 0 if c.provenance.get("significance") == "wilcoxon" else c.provenance.get("bootstrap_resamples", 0)
    least = 2 * len(c.pairs) / (resamples + 1) if resamples else 0.0
    return Matrix(names, cells, sum(t.p_adjusted <= SIGNIFICANT for t in c.pairs), len(c.pairs), least)


def _turned(test: PairTest) -> PairTest:
    low, high = test.interval
    return replace(test, first=test.second, second=test.first, difference=-test.difference, interval=(-high, -low))
