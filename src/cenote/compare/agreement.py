"""How well predicted scores agree with given ones, clip by clip and system by system."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from cenote.compare.intervals import of_draws
from cenote.core.errors import InputError


class Agreement(NamedTuple):
    """Of predicted scores with given ones; NaN where one side does not vary.

    Attributes:
        rank: Spearman's correlation.
        linear: Pearson's.
        kendall: Kendall's tau-b.
        squared_error: the mean of it.
    """

    rank: float
    linear: float
    kendall: float
    squared_error: float


def agreement(guess: Float[ndarray, "items"], truth: Float[ndarray, "items"]) -> Agreement:
    """Agreement of the scores of single items.

    >>> agreement(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 9.0])).rank
    1.0
    """
    from scipy import stats

    if guess.shape != truth.shape or not guess.size:
        raise InputError(f"guess: expected one score per item, as truth has them {truth.shape}, got {guess.shape}")
    error = float(np.square(guess - truth).mean())
    if np.ptp(guess) == 0 or np.ptp(truth) == 0:
        return Agreement(np.nan, np.nan, np.nan, error)
    rank, linear, kendall = (float(f(guess, truth)[0]) for f in (stats.spearmanr, stats.pearsonr, stats.kendalltau))
    return Agreement(rank, linear, kendall, error)


def system_agreement(
    guess: Float[ndarray, "items"], truth: Float[ndarray, "items"], system: Shaped[ndarray, "items"]
) -> Agreement:
    """Agreement of the systems' mean scores.

    Args:
        guess, truth: of each item.
        system: what made it, by name or number.
    """
    return agreement(*(_means(values, system) for values in (guess, truth)))


def system_interval(
    guess: Float[ndarray, "items"],
    truth: Float[ndarray, "items"],
    system: Shaped[ndarray, "items"],
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the systems' rank correlation, by a bootstrap that draws systems with all that they made.

    Resamples whose systems are all alike have no rank correlation and are left out.
    """
    means = [_means(values, system) for values in (guess, truth)]
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(means[0]), size=(resamples, len(means[0])))
    found = np.array([agreement(*(m[chosen] for m in means)).rank for chosen in drawn])
    if np.isnan(found).all():
        raise InputError(f"system: {len(means[0])} systems have no rank correlation; give two at least that differ")
    return of_draws(found, level)


def _means(values: Float[ndarray, "items"], system: Shaped[ndarray, "items"]) -> Float[ndarray, "systems"]:
    if values.shape != system.shape:
        raise InputError(f"system: expected one per item, {values.shape}, got {system.shape}")
    _, of_item, count = np.unique(system, return_inverse=True, return_counts=True)
    return np.bincount(of_item, values) / count
