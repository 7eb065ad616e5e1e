"""What came out of reducing a collection: plain data that the report, the command line and Python read alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from cenote.compare.result import ArmResult
from cenote.compare.smaller import Smaller
from cenote.compare.words import Words

JOB = "reduce"
LOSS = 0.02


@dataclass(frozen=True, kw_only=True)
class IndexResult(ArmResult):
    """One index of the collection. What was not measured is `None`.

    Attributes:
        metric: mean nDCG@10.
        reducer: what the arm is without its factor.
        factor: how many times fewer vectors were asked for.
        norm: `unit` or `raw` of means, `rows` where vectors are rows of the input.
        vectors: in the index.
        bytes: on disk.
        mrr: mean of the reciprocal rank of the first answer, of ten.
        recall: mean share of the answers that are among the first hundred.
        alike: mean overlap of the first ten with those of all vectors, by Jaccard.
        pool_ms: CPU time of reducing one document.
        search_ms: CPU time of one query.
    """

    reducer: str
    factor: float
    norm: str
    vectors: int
    bytes: int
    mrr: float
    recall: float
    alike: float = 1.0
    pool_ms: float | None = None
    search_ms: float | None = None

    @property
    def cost(self) -> float | None:
        """What the index takes on disk."""
        return float(self.bytes)


@dataclass(frozen=True, kw_only=True, repr=False)
class Frontier(Smaller[IndexResult]):
    """The whole verdict of `cenote reduce` of a collection: what fewer vectors cost in search.

    Attributes:
        dataset: the collection, in numbers.
        loss: how much of the metric may be lost.
        most_bytes: that the index may take; `None`: as little as `loss` allows.
        detectable: a difference that this many queries show four times out of five.
        lost: queries that lose most by what is recommended: name, metric of all vectors, metric.
        notes: what was left out, and what to know of the vectors.
        job: tells the file from those of other jobs.
    """

    result_type: ClassVar[type[Any]] = IndexResult

    dataset: dict[str, Any]
    loss: float = LOSS
    most_bytes: int | None = None
    detectable: float = float("nan")
    lost: tuple[tuple[str, float, float], ...] = ()
    notes: tuple[str, ...] = ()
    job: str = JOB

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row per index, best first: what a data frame is made of."""
        return [
            {
                **self.beside_baseline(r),
                "kept": self.kept(r.method)[0],
                "vectors": r.vectors,
                "bytes": r.bytes,
                "mrr@10": r.mrr,
                "recall@100": r.recall,
                "alike": r.alike,
                "pool_ms": r.pool_ms,
                "search_ms": r.search_ms,
            }
            for r in self.results
        ]

    def kept(self, method: str) -> tuple[float, tuple[float, float]]:
        """What is kept of the metric of all vectors, as a share, with its interval; that metric is taken as it is."""
        whole = self[self.baseline].metric
        test = next((t for t in self.against_baseline if t.first == method), None)
        if test is None or not whole:
            return (1.0, (1.0, 1.0)) if whole else (math.nan, (math.nan, math.nan))
        low, high = test.interval
        return 1 + test.difference / whole, (1 + low / whole, 1 + high / whole)

    def smallest(self, loss: float = LOSS) -> str | None:
        """The smallest index of which the data say that it loses no more: the lower end of its difference's interval.

        Of indexes of one factor the best. `None` where there is none.
        """
        lower = {t.first: t.interval[0] for t in self.against_baseline}
        fit = [r for r in self.candidates if lower[r.method] >= -loss]
        if not fit:
            return None
        factor = max(r.factor for r in fit)
        return max((r for r in fit if r.factor == factor), key=lambda r: r.metric).method

    def best_within(self, most_bytes: int) -> str | None:
        """The best index that takes no more bytes, that of all vectors too; `None` where there is none."""
        fit = [r for r in (*self.candidates, self[self.baseline]) if r.bytes <= most_bytes]
        return max(fit, key=lambda r: r.metric).method if fit else None

    @property
    def tested(self) -> str:
        """On what, in words."""
        return f"{self.dataset['queries']:,} queries over {self.dataset['documents']:,} documents"

    @property
    def words(self) -> Words:
        """An nDCG is written as it is."""
        return Words(arms="indexes", cost="bytes")
