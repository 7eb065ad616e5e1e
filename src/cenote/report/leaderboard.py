"""Rows of the leaderboard."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cenote.compare import PairTest
from cenote.compare.statistics import SIGNIFICANT
from cenote.jobs.probe.result import Comparison, MethodResult


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        rank: 1 is best.
        against: the test against the baseline; `None` for the baseline itself.
        tied: not distinguishable from the winner.
        low, high, middle, seeds: positions of interval, metric and seeds on the common scale, in percent of its length.
    """

    rank: int
    result: MethodResult
    against: PairTest | None
    winner: bool
    baseline: bool
    tied: bool
    efficient: bool
    low: float
    high: float
    middle: float
    seeds: tuple[float, ...]

    def key(self, column: str) -> str:
        """What the browser sorts by; empty where there is nothing, which sorts last."""
        r, t = self.result, self.against
        value = {
            "rank": self.rank,
            "method": r.method,
            "metric": r.metric,
            "difference": t.difference if t else (0.0 if self.baseline else None),
            "p": t.p_adjusted if t else None,
            "parameters": r.parameters,
            "multiply-adds": r.multiply_adds,
            "latency": r.latency_ms,
            "seconds": r.seconds,
            "pareto": int(self.efficient),
        }[column]
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return ""
        return f"{value:.9g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Leaderboard:
    """All rows, best first, and the ends of the common scale of their intervals.

    Attributes:
        reference: where the baseline stands on the scale, in percent of its length.
    """

    rows: tuple[Row, ...]
    low: float
    high: float
    reference: float | None


def leaderboard(c: Comparison) -> Leaderboard:
    """The results as rows."""
    tests = {t.first: t for t in c.against_baseline}
    beside_winner = {t.first: t for t in c.against_winner}
    seen = [v for r in c.results for v in (*r.interval, r.metric, *r.metric_per_seed) if math.isfinite(v)]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 1) if math.isfinite(value) else 0.0

    rows = tuple(
        Row(
            rank=rank,
            result=r,
            against=tests.get(r.method),
            winner=r.method == c.winner,
            baseline=r.method == c.baseline,
            tied=r.method in beside_winner and beside_winner[r.method].p_adjusted > SIGNIFICANT,
            efficient=r.method in c.pareto,
            low=place(r.interval[0]),
            high=place(r.interval[1]),
            middle=place(r.metric),
            seeds=tuple(place(v) for v in r.metric_per_seed),
        )
        for rank, r in enumerate(c.results, start=1)
    )
    reference = next((row.middle for row in rows if row.baseline), None)
    return Leaderboard(rows, low, high, reference)
