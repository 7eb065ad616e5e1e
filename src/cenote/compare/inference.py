"""From scores of arms on the same units to intervals and p-values: all that is random or assumed stands behind one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from cenote.compare import metrics, statistics
from cenote.compare.intervals import Limits, Spread, interval, left_out, with_seeds
from cenote.compare.metrics import Carriers, Metric, PairShares, Shares, mean, mean_shares
from cenote.compare.statistics import Significance
from cenote.compare.units import Units
from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of

SeedEffects = Literal["fixed", "random"]
"""Whether a verdict speaks of the trained seeds alone, or of all that might have been drawn."""

BLOCKS = 1000
"""More groups than these are thrown together at random: an interval does not get better by more."""


@dataclass(frozen=True)
class Measure:
    """What arms are compared by.

    Attributes:
        name: for people.
        metric: of scores under weights of the units; higher is better.
        truth: what the scores are compared with, one entry per unit; `None` where units have scores of their own.
        shares: what each unit adds to the metric; `None` for metrics that rank units against each other. The mean's are known.
        pair_shares: what each unit adds to a difference, of a metric without `shares`; where there is neither, arms are
            exchanged by brute force.
        by_rank: whether the metric sees only the order of the scores; they are then exchanged as ranks.
        limits: between which the metric lies.
        carriers: how many groups it stands on; default: all.
    """

    name: str
    metric: Metric = mean
    truth: Any = None
    shares: Shares | None = None
    pair_shares: PairShares | None = None
    by_rank: bool = False
    limits: Limits = (None, None)
    carriers: Carriers | None = None

    def __post_init__(self) -> None:
        if self.metric is mean and self.shares is None:
            object.__setattr__(self, "shares", mean_shares)

    def carried_by(self, truth: Any, groups: Int[ndarray, "units"]) -> float:
        """How many groups of one size the metric stands on: of all, or of those that carry it."""
        sizes = np.bincount(groups)
        # groups of unlike sizes are as good as fewer of one size (Kish)
        alike = float(sizes.sum() ** 2 / (sizes**2).sum())
        return alike if self.carriers is None else min(alike, self.carriers(truth, groups))

    @classmethod
    def known(cls, name: str, truth: Any) -> Measure:
        """A metric of `cenote.compare.metrics.METRICS`, with all that is known of it."""
        return cls(
            name,
            metrics.METRICS[name],
            truth,
            metrics.SHARES.get(name),
            metrics.PAIR_SHARES.get(name),
            name in metrics.RANKING,
            metrics.LIMITS[name],
            metrics.CARRIERS.get(name),
        )


class Inferred(Protocol):
    """What a table is made of: see `Inference`, from one split, and `cenote.compare.folds.Resampled`, from several.

    Attributes:
        means: of each arm, its metric.
        per_seed: of each arm, its metric with each seed.
    """

    means: list[float]
    per_seed: list[tuple[float, ...]]

    def interval(self, arm: int) -> tuple[float, float]:
        """Of an arm's metric, 95 %; NaN where it cannot be known."""

    def differences(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, tuple[float, float], float]]:
        """`(difference, its 95 % interval, two-sided p-value)` of pairs of arms."""

    def too_few(self, tests: int, units: Units, /) -> str:
        """Why none of so many tests could be significant, however much better an arm is; empty where one could."""

    def of_arm(self, arm: int, /) -> dict[str, Any]:
        """What is told of an arm besides, by fields of `ArmResult`."""

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to repeat it."""


def require_seeds(seed_effects: SeedEffects, scores: Sequence[Float[ndarray, "seeds units *outputs"]]) -> None:
    """Raises: InputError: where the variance over seeds is asked for, and an arm has one."""
    if seed_effects == "random" and min(len(arm) for arm in scores) < 2:
        raise InputError("seed_effects: random needs at least 2 seeds of each arm, for their variance")


class Inference:
    """How sure each arm's metric is, and each difference.

    Args:
        measure: what arms are compared by.
        scores: of each arm.
        units: that they were measured on.
        significance: where p-values come from: `"permutation"`, the two arms exchanged in whole groups, exact where that can
            be counted out; `"wilcoxon"`, signed ranks of what each group adds.
        seed_effects: `"fixed"`: intervals and p-values speak of the mean of these seeds on other units. `"random"`: of other
            seeds as well: the variance over the seeds is added, and a difference's p-value is the larger of the units' and
            that of a t test with both variances.

    Raises:
        InputError: where that is unknown, asks for shares that the measure has not, or for the variance over one seed.
    """

    def __init__(
        self,
        measure: Measure,
        scores: Sequence[Float[ndarray, "seeds units *outputs"]],
        units: Units,
        significance: Significance = "permutation",
        seed_effects: SeedEffects = "fixed",
    ) -> None:
        require_one_of(get_args(Significance), significance=significance)
        require_one_of(get_args(SeedEffects), seed_effects=seed_effects)
        if significance == "wilcoxon" and measure.shares is None:
            raise InputError(
                f"significance: wilcoxon compares what units add to the metric, and {measure.name} has no such shares, "
                "use permutation, or give Measure(shares=...)"
            )
        require_seeds(seed_effects, scores)
        self.measure, self.significance, self.seed_effects = measure, significance, seed_effects
        groups = units.group_numbers()
        self.groups = int(groups.max()) + 1
        self._blocks = statistics.merged(groups, BLOCKS)
        self._count = int(self._blocks.max()) + 1
        self._carriers = measure.carried_by(measure.truth, self._blocks)
        ones = np.ones((1, len(units)))
        with np.errstate(invalid="ignore", divide="ignore"):
            self.per_seed = [tuple(float(measure.metric(s, measure.truth, ones)[0]) for s in arm) for arm in scores]
        self.means = [float(np.mean(p)) for p in self.per_seed]
        self.flips = statistics.flips_for(len(scores))
        self._scores = [np.stack([metrics.ranked(s) for s in arm]) for arm in scores] if measure.by_rank else scores
        self._given = scores
        self._left_out: dict[int, Float[ndarray, "groups"]] = {}

    def interval(self, arm: int) -> tuple[float, float]:
        """Of an arm's metric, 95 %; NaN where it cannot be known."""
        spread = Spread.of(self._without(arm), self._carriers)
        if self.seed_effects == "random":
            spread = with_seeds(spread, self.per_seed[arm])
        return interval(self.means[arm], spread, self.measure.limits, self._carriers)

    def differences(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, tuple[float, float], float]]:
        """`(difference, its 95 % interval, two-sided p-value)` of pairs of arms."""
        found = []
        for (a, b), p in zip(pairs, self._p_values(pairs), strict=True):
            d = self.means[a] - self.means[b]
            spread = Spread.of(self._without(a) - self._without(b), self._carriers)
            if self.seed_effects == "random":
                spread = with_seeds(spread, self.per_seed[a], self.per_seed[b])
                p = max(p, spread.p_value(d))
            found.append((d, interval(d, spread), p))
        return found

    def too_few(self, tests: int, units: Units, /) -> str:
        """Why none of so many tests could be significant, however much better an arm is; empty where one could."""
        needed = statistics.least_groups(tests)
        if not tests or self.groups >= needed:
            return ""
        kind = "unit" if units.groups is None else "group"
        return (
            f"{self.groups} test {kind}{'' if self.groups == 1 else 's'} cannot carry one: with fewer than {needed}, "
            f"none of {tests + 1} can be told from the others at p <= {statistics.SIGNIFICANT}, however much better it is"
        )

    def of_arm(self, _arm: int, /) -> dict[str, Any]:
        """Nothing besides."""
        return {}

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to repeat it."""
        return {
            "significance": self.significance,
            "flips": self.flips,
            "groups": self.groups,
            "seed_effects": self.seed_effects,
        }

    def _without(self, arm: int) -> Float[ndarray, "groups"]:
        """The arm's metric without each group, mean over the seeds."""
        if arm not in self._left_out:
            measure, scores = self.measure, self._given[arm]
            self._left_out[arm] = np.mean([left_out(measure.metric, s, measure.truth, self._blocks) for s in scores], 0)
        return self._left_out[arm]

    def _p_values(self, pairs: Sequence[tuple[int, int]]) -> list[float]:
        measure = self.measure
        if measure.shares is None and measure.pair_shares is None:
            return [self._exchanged(a, b, len(pairs)) for a, b in pairs]
        if not pairs:
            return []
        if measure.shares is not None:
            of_arm = [
                np.bincount(self._blocks, np.mean([measure.shares(s, measure.truth) for s in arm], 0), self._count)
                for arm in self._scores
            ]
            shares = np.stack([of_arm[a] - of_arm[b] for a, b in pairs], 1)
        else:
            shares = np.stack([self._pair_shares(a, b) for a, b in pairs], 1)
        if self.significance == "wilcoxon":
            return [statistics.signed_rank_p(d) for d in shares.T]
        return [float(p) for p in statistics.sign_flip_p(shares, self.flips)]

    def _pair_shares(self, a: int, b: int) -> Float[ndarray, "groups"]:
        """What each group adds to the mean over the seeds, each seed exchanged with one of the other arm."""
        assert self.measure.pair_shares is not None
        shares = [self.measure.pair_shares(x, y, self.measure.truth) for x, y in self._matched(a, b)]
        return np.bincount(self._blocks, np.mean(shares, 0), self._count)

    def _exchanged(self, a: int, b: int, pairs: int) -> float:
        measure = self.measure
        matched = [np.concatenate([x, y]) for x, y in self._matched(a, b)]
        truth = None if measure.truth is None else np.concatenate([measure.truth, measure.truth])

        def difference(kept: Float[ndarray, "exchanges groups"]) -> Float[ndarray, "exchanges"]:
            return np.concatenate([of_some(part) for part in metrics.pieces(kept, 4 * len(self._blocks))])

        def of_some(kept: Float[ndarray, "exchanges groups"]) -> Float[ndarray, "exchanges"]:
            own = kept[:, self._blocks]
            there, back = np.concatenate([own, 1 - own], 1), np.concatenate([1 - own, own], 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.mean(
                    [measure.metric(s, truth, there) - measure.metric(s, truth, back) for s in matched], axis=0
                )

        numbers = 2.0 * pairs * sum(s.size for s in matched)
        return statistics.exchange_p(difference, self._count, statistics.exchanges_for(numbers))

    def _matched(self, a: int, b: int) -> list[tuple[ndarray, ndarray]]:
        first, second = self._scores[a], self._scores[b]
        count = max(len(first), len(second))
        return [(first[s % len(first)], second[s % len(second)]) for s in range(count)]
