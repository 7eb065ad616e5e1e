"""How far off a metric may be: the jackknife over groups, on the scale that the metric lives on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from cenote.compare.metrics import Metric, pieces

Limits = tuple[float | None, float | None]
"""The least and the largest value that a metric can have; `None`: there is none."""

LEVEL = 0.95
UNKNOWN = (math.nan, math.nan)


def of_draws(values: Float[ndarray, "draws"], level: float = LEVEL) -> tuple[float, float]:
    """The central share of a number over draws of what it was measured on; draws without it are left out."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def left_out(metric: Metric, scores: ndarray, truth: object, groups: Int[ndarray, "units"]) -> Float[ndarray, "groups"]:
    """The metric without each group."""
    numbers = np.arange(int(groups.max()) + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate(
            [
                metric(scores, truth, (groups != part[:, None]).astype(np.float64))
                for part in pieces(numbers, len(groups))
            ]
        )


@dataclass(frozen=True)
class Spread:
    """The variance of a metric, and how well it is known.

    Attributes:
        variance: of the metric.
        freedom: degrees of freedom of `variance`.
    """

    variance: float
    freedom: float

    @classmethod
    def of(cls, values: Float[ndarray, "groups"], carriers: float) -> Spread:
        """Of a metric, from its values without each group.

        Few groups that decide the metric leave few degrees of freedom: Satterthwaite's, from the kurtosis of what each
        group changes, and no more than the groups that carry the metric leave.

        Args:
            values: the metric without each group.
            carriers: how many groups of one size it stands on: fewer than there are where sizes differ, or where only those
                with an item of the rarest class decide.
        """
        count = len(values)
        if count < 2 or not np.isfinite(values).all():
            return cls(math.nan, 0.0)
        changes = values - values.mean()
        squares = float((changes**2).sum())
        most = float(max(1, min(count, carriers) - 1))
        if squares == 0:
            return cls(0.0, most)
        kurtosis = count * float((changes**4).sum()) / squares**2
        freedom = 2 * count / (kurtosis - 1) if kurtosis > 1 else most
        return cls((count - 1) / count * squares, min(most, max(1.0, freedom)))

    def plus(self, other: Spread) -> Spread:
        """Of the sum of two independent numbers, with Satterthwaite's degrees of freedom."""
        variance = self.variance + other.variance
        parts = self.variance**2 / max(self.freedom, 1e-9) + other.variance**2 / max(other.freedom, 1e-9)
        return Spread(variance, variance**2 / parts if parts > 0 else min(self.freedom, other.freedom))

    def p_value(self, value: float) -> float:
        """Two-sided, of a number that is zero on average, by Student's t; 1 where the variance is zero or not known."""
        import scipy.stats

        if not self.variance > 0:
            return 1.0
        return float(2 * scipy.stats.t.sf(abs(value) / math.sqrt(self.variance), self.freedom))

    @property
    def quantile(self) -> float:
        """Of Student's t, for an interval of 95 %."""
        import scipy.stats

        return float(scipy.stats.t.ppf(0.5 + LEVEL / 2, self.freedom))


def with_seeds(spread: Spread, *per_seed: Sequence[float]) -> Spread:
    """The same with the variance of arms' means over their seeds."""
    for values in per_seed:
        spread = spread.plus(Spread(float(np.var(values, ddof=1)) / len(values), len(values) - 1.0))
    return spread


def interval(value: float, spread: Spread, limits: Limits = (None, None), carriers: float = 1.0) -> tuple[float, float]:
    """95 % interval of a metric or a difference, of the t distribution.

    Between two limits it is Wilson's, with as many units as have the metric's variance, so that it has a width also where
    nothing went wrong; below an upper limit it is taken of the logarithm of what is missing.

    Args:
        value: the metric.
        spread: of it.
        limits: see `Limits`.
        carriers: units that a metric at its limit counts as.
    """
    if not (math.isfinite(value) and math.isfinite(spread.variance)):
        return UNKNOWN
    t, (low, high) = spread.quantile, limits
    if low is not None and high is not None:
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        variance, binomial = spread.variance / (high - low) ** 2, share * (1 - share)
        units = binomial / variance if variance > 0 and binomial > 0 else carriers
        middle = (share + t**2 / (2 * units)) / (1 + t**2 / units)
        reach = t / (1 + t**2 / units) * math.sqrt(binomial / units + (t / (2 * units)) ** 2)
        return low + (high - low) * (middle - reach), low + (high - low) * (middle + reach)
    if high is not None and value < high:
        missing = high - value
        factor = math.exp(min(700.0, t * math.sqrt(spread.variance) / missing))
        return high - missing * factor, high - missing / factor
    reach = t * math.sqrt(spread.variance)
    return value - reach, value + reach
