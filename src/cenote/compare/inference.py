"""From scores of arms on the same units to intervals and p-values: all that is random or assumed stands behind one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from cenote.compare import statistics
from cenote.compare.metrics import Metric, Shares, mean, mean_shares
from cenote.compare.statistics import Significance
from cenote.compare.units import Units
from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of


@dataclass(frozen=True)
class Measure:
    """What arms are compared by.

    Attributes:
        name: for people.
        metric: of scores under weights of the units; higher is better.
        truth: what the scores are compared with, one entry per unit; `None` where units have scores of their own.
        shares: what each unit adds to the metric; `None` for metrics that rank units against each other. The mean's are known.
    """

    name: str
    metric: Metric = mean
    truth: Any = None
    shares: Shares | None = None

    def __post_init__(self) -> None:
        if self.metric is mean and self.shares is None:
            object.__setattr__(self, "shares", mean_shares)


class Inference:
    """How sure each arm's metric is, and each difference.

    Args:
        measure: what arms are compared by.
        scores: of each arm.
        units: that they were measured on.
        significance: where p-values come from; intervals are always those of the bootstrap.

    Raises:
        InputError: where that is unknown, or asks for shares that the measure has not.
    """

    def __init__(
        self,
        measure: Measure,
        scores: Sequence[Float[ndarray, "seeds units *outputs"]],
        units: Units,
        significance: Significance = "bootstrap",
    ) -> None:
        require_one_of(get_args(Significance), significance=significance)
        groups, ones = units.group_numbers(), np.ones((1, len(units)))
        by_rank = significance == "wilcoxon"
        self.per_seed = [tuple(float(measure.metric(s, measure.truth, ones)[0]) for s in arm) for arm in scores]
        self.means = [float(np.mean(p)) for p in self.per_seed]
        self.resamples = statistics.RESAMPLES if by_rank else statistics.resamples_for(len(scores))
        self._samples = statistics.resampled_metrics(measure.metric, scores, measure.truth, groups, self.resamples)
        self._shares: list[ndarray] | None = None
        if by_rank:
            shares = measure.shares
            if shares is None:
                raise InputError(
                    f"significance: wilcoxon compares what units add to the metric, and {measure.name} has no such shares, "
                    "use bootstrap, or give Measure(shares=...)"
                )
            self._shares = [np.bincount(groups, np.mean([shares(s, measure.truth) for s in arm], 0)) for arm in scores]

    def interval(self, arm: int) -> tuple[float, float]:
        """Of an arm's metric, 95 %."""
        return statistics.interval(self._samples[arm])

    def difference(self, first: int, second: int) -> tuple[float, tuple[float, float], float]:
        """`(difference, its 95 % interval, two-sided p-value)` of two arms."""
        d = self._samples[first] - self._samples[second]
        p = (
            statistics.two_sided_p(d)
            if self._shares is None
            else statistics.signed_rank_p(self._shares[first] - self._shares[second])
        )
        return self.means[first] - self.means[second], statistics.interval(d), p

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to repeat it."""
        return {
            "bootstrap_resamples": self.resamples,
            "significance": "bootstrap" if self._shares is None else "wilcoxon",
        }
