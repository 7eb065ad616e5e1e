"""Arms that take less of something, beside one that takes all of it: what they lose, and what so many units can show."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, TypeVar

from cenote.compare.result import ArmResult, Comparison, PairTest

R = TypeVar("R", bound=ArmResult)

POWER = (1.96 + 0.84) / 1.96
"""Of a difference that is found four times out of five, and half the width of a 95 % interval."""
THREE = 3.0
"""Of `n` units without a single change, `3 / n` is the 95 % bound of the share that changes."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Smaller(Comparison[R]):
    """Arms that keep less of something, beside one that keeps all of it."""

    @property
    def verdict(self) -> str:
        """The sentence."""
        return self.sentence

    @property
    def candidates(self) -> tuple[R, ...]:
        """What may be recommended: no control, and not what keeps all; the cheapest first, of equal ones the best."""
        found = [r for r in self.results if not r.control and not r.reference and r.method != self.baseline]
        return tuple(sorted(found, key=lambda r: (r.cost or 0.0, -r.metric)))

    def beside_baseline(self, result: R) -> dict[str, Any]:
        """Its metric, and what it differs by from what keeps all."""
        test = next((t for t in self.against_baseline if t.first == result.method), None)
        return {
            "method": result.method,
            self.metric_name: result.metric,
            "difference": 0.0 if test is None else test.difference,
            "interval": (0.0, 0.0) if test is None else test.interval,
            "p_adjusted": None if test is None else test.p_adjusted,
        }


def lowest(test: PairTest, units: int) -> float:
    """The lower end of a difference of shares; where no unit differs, what so many units without a change still allow.

    >>> lowest(PairTest("half", "all", 0.0, (0.0, 0.0), 1.0, 1.0), 30)
    -0.1
    """
    low, high = test.interval
    return low if high > low else min(low, -THREE / units)


def detectable(found: Smaller[Any]) -> float:
    """The difference from what keeps all that these units show four times out of five: of middling arms."""
    names = {r.method for r in found.candidates}
    halves = [(t.interval[1] - t.interval[0]) / 2 for t in found.against_baseline if t.first in names]
    halves = [h for h in halves if h == h]
    return POWER * statistics.median(halves) if halves else float("nan")
