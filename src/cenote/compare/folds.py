"""From folds to intervals and p-values: several splits of the same items, whose training sets overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from cenote.compare.inference import Measure, SeedEffects, require_seeds
from cenote.compare.intervals import Spread, interval, with_seeds
from cenote.compare.units import Units
from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of

CORRECTED_T = "corrected t"
"""What `provenance["significance"]` calls the test of folds."""


@dataclass(frozen=True)
class Folds:
    """Splits of the same items: units are the test items of the first fold, then those of the second, and so on.

    Attributes:
        of_unit: the fold in which each unit was tested, from 0.
        trained_on: how many items each fold was trained on.

    Raises:
        InputError: where there are fewer than two folds, or one without units or training items.
    """

    of_unit: Int[ndarray, "units"]
    trained_on: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.trained_on) < 2 or min(self.trained_on) < 1:
            raise InputError(f"trained_on: expected training items in two folds or more, got {self.trained_on}")
        tested = sorted(set(self.of_unit.tolist()))
        if tested != list(range(len(self))):
            raise InputError(f"of_unit: expected units in folds 0 to {len(self) - 1}, got them in {tested}")

    def __len__(self) -> int:
        return len(self.trained_on)

    def ratio(self) -> float:
        """Test items for each training item, mean over the folds.

        >>> Folds(np.array([0, 0, 1, 1]), (4, 4)).ratio()
        0.5
        """
        return float(np.mean(np.bincount(self.of_unit, minlength=len(self)) / np.array(self.trained_on)))


class Resampled:
    """How sure each arm's metric is, and each difference, by the corrected resampled t test.

    The metric is taken in each fold, mean over the seeds, and averaged over the folds. Folds share most of what they train on,
    so that they differ less than other data would. With `s^2` the variance over `J` folds of an arm's metric, or of a
    difference, paired in each fold, the variance of its mean is

        (1 / J + n_test / n_train) s^2

    and not `s^2 / J`; the mean over its root has Student's t distribution with `J - 1` degrees of freedom. Rounds of folds
    cannot make more of few groups: `J` counts no more folds than there are groups.

    Args:
        measure: what arms are compared by.
        scores: of each arm.
        units: that they were measured on.
        folds: in which.
        seed_effects: `"random"` adds the variance over the seeds, as in `Inference`.

    Raises:
        InputError: where there is not one fold for each unit, or one seed and its variance is asked for.

    Source: Nadeau, Bengio, "Inference for the Generalization Error", Machine Learning 2003; Bouckaert, Frank, "Evaluating the
    Replicability of Significance Tests for Comparing Learning Algorithms", PAKDD 2004 (repeated folds).
    """

    def __init__(
        self,
        measure: Measure,
        scores: Sequence[Float[ndarray, "seeds units *outputs"]],
        units: Units,
        folds: Folds,
        seed_effects: SeedEffects = "fixed",
    ) -> None:
        require_one_of(get_args(SeedEffects), seed_effects=seed_effects)
        require_seeds(seed_effects, scores)
        if len(folds.of_unit) != len(units):
            raise InputError(f"folds: expected one for each of {len(units)} units, got {len(folds.of_unit)}")
        self.measure, self.folds, self.seed_effects = measure, folds, seed_effects
        where = [np.flatnonzero(folds.of_unit == j) for j in range(len(folds))]
        self._per_fold = [np.stack([_metrics(measure, arm, w) for w in where], 1) for arm in scores]
        self.per_seed = [tuple(float(v) for v in of_arm.mean(1)) for of_arm in self._per_fold]
        self.means = [float(of_arm.mean()) for of_arm in self._per_fold]
        groups = units.group_numbers()
        self.groups = int(groups.max()) + 1
        self._carriers = float(np.mean([_carriers(measure, groups, w) for w in where]))
        self._count = min(len(folds), self.groups)
        self.correction = 1 / self._count + folds.ratio()

    def interval(self, arm: int) -> tuple[float, float]:
        """Of an arm's metric, 95 %; NaN where it cannot be known."""
        at_limit = max(1.0, self._carriers / self.correction)
        return interval(self.means[arm], self._spread(self._per_fold[arm].mean(0), arm), self.measure.limits, at_limit)

    def differences(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, tuple[float, float], float]]:
        """`(difference, its 95 % interval, two-sided p-value)` of pairs of arms."""
        found = []
        for a, b in pairs:
            d = self._per_fold[a].mean(0) - self._per_fold[b].mean(0)
            spread = self._spread(_known_to_vary(d), a, b)
            found.append((self.means[a] - self.means[b], interval(float(d.mean()), spread), spread.p_value(d.mean())))
        return found

    def too_few(self, _tests: int, _units: Units, /) -> str:
        """Nothing: a t test has no smallest p-value."""
        return ""

    def of_arm(self, arm: int, /) -> dict[str, Any]:
        """What is told of an arm besides."""
        return {"metric_per_fold": tuple(float(v) for v in self._per_fold[arm].mean(0))}

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to repeat it."""
        return {
            "significance": CORRECTED_T,
            "correction": self.correction,
            "groups": self.groups,
            "seed_effects": self.seed_effects,
        }

    def _spread(self, per_fold: Float[ndarray, "folds"], *arms: int) -> Spread:
        most = max(1, self._count - 1)
        variance = float(np.var(per_fold)) * (most + 1) / most
        spread = Spread(self.correction * variance, float(most))
        if self.seed_effects == "random":
            spread = with_seeds(spread, *(self.per_seed[arm] for arm in arms))
        # seeds are no folds: with them an interval never gets narrower
        return Spread(spread.variance, min(spread.freedom, most))


def _metrics(measure: Measure, arm: Float[ndarray, "seeds units *outputs"], where: ndarray) -> Float[ndarray, "seeds"]:
    """Of one fold."""
    truth, ones = None if measure.truth is None else measure.truth[where], np.ones((1, len(where)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.array([float(measure.metric(scores[where], truth, ones)[0]) for scores in arm])


def _carriers(measure: Measure, groups: Int[ndarray, "units"], where: ndarray) -> float:
    """Groups that carry the metric of one fold."""
    of_fold = np.unique(groups[where], return_inverse=True)[1]
    return measure.carried_by(None if measure.truth is None else measure.truth[where], of_fold)


def _known_to_vary(differences: Float[ndarray, "folds"]) -> Float[ndarray, "folds"]:
    """Differences, NaN where all are the same and not zero: such folds do not tell how much others would differ."""
    largest = np.abs(differences).max()
    if largest > 0 and np.ptp(differences) <= 1e-9 * largest:
        return np.full_like(differences, np.nan)
    return differences
