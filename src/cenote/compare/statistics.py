"""Which differences could be chance: exchanges of two arms in whole groups, Wilcoxon's test, Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

Significance = Literal["permutation", "wilcoxon"]
"""Where p-values come from."""

SIGNIFICANT = 0.05
FLIPS = 9999
FLIPS_PER_PAIR = 40
FLIPS_AT_ONCE = 2000
EXCHANGES = (199, 1999)
EXCHANGED_NUMBERS = 4e9
PINELIS = 2 * math.e**3 / 9
"""A weighted sum of random signs exceeds a bound at most so many times as often as a normal variable of its variance (Pinelis
1994, "Extremal probabilistic problems and Hotelling's T2 test under a symmetry condition")."""


def flips_for(arms: int) -> int:
    """Enough random flips that the smallest p-value, `1 / (flips + 1)`, stays significant when Holm corrects over all pairs.

    >>> flips_for(3), flips_for(32)
    (9999, 19840)
    """
    return max(FLIPS, FLIPS_PER_PAIR * arms * (arms - 1) // 2)


def sign_flip_p(shares: Float[ndarray, "groups pairs"], flips: int = FLIPS, seed: int = 0) -> Float[ndarray, "pairs"]:
    """Two-sided p-values of sums of differences: how often would they be as large with the arms exchanged in random groups?

    Exact where at most `flips` sign patterns differ (the sum of the opposite signs is as large), else of random ones. Where no
    arm is better, a group's difference is as likely as its opposite, and the p-values hold for however few groups; the
    smallest is `2 / 2 ** groups`.

    Args:
        shares: what each group adds to each pair's difference.
        flips: sign patterns, at most.
        seed: of random ones.

    >>> sign_flip_p(np.array([[0.1], [0.2], [0.3], [0.1], [0.2], [0.4]])).tolist()
    [0.03125]
    """
    groups = len(shares)
    finite = np.isfinite(shares).all(0)
    shares = np.where(finite, shares, 0.0)
    exact = groups <= 1 + math.log2(flips)
    observed = np.abs(shares.sum(0)) - 1e-9 * np.abs(shares).sum(0)
    total = 2 ** (groups - 1) if exact else flips
    rng, hits = np.random.default_rng(seed), np.zeros(shares.shape[1])
    for start in range(0, total, FLIPS_AT_ONCE):
        size = min(FLIPS_AT_ONCE, total - start)
        patterns = (
            np.arange(start, start + size)[:, None] >> np.arange(groups) & 1
            if exact
            else rng.integers(0, 2, (size, groups), dtype=np.int8)
        )
        hits += (np.abs((1.0 - 2.0 * patterns) @ shares) >= observed).sum(0)
    p = hits / total if exact else (hits + 1) / (total + 1)
    return np.where(finite, p, 1.0)


def exchange_p(
    difference: Callable[[Float[ndarray, "exchanges groups"]], Float[ndarray, "exchanges"]],
    groups: int,
    exchanges: int,
    seed: int = 0,
) -> float:
    """The same for a difference that is no sum over groups.

    Where none of the random exchanges reaches what was seen, the p-value is that of `PINELIS`' bound, if it is smaller, as if
    the difference were a sum over groups, and never below `2 / 2 ** groups`.

    Args:
        difference: of rows of 1 (as measured) and 0 (exchanged), one number per group.
        groups: how many there are.
        exchanges: random ones.
        seed: of them.
    """
    kept = np.random.default_rng(seed).integers(0, 2, (exchanges, groups)).astype(np.float64)
    observed = float(difference(np.ones((1, groups)))[0])
    drawn = difference(kept)
    drawn = np.abs(drawn[np.isfinite(drawn)])
    if not math.isfinite(observed) or not len(drawn):
        return 1.0
    hits = int((drawn >= abs(observed) * (1 - 1e-9)).sum())
    p = (hits + 1) / (len(drawn) + 1)
    if hits:
        return p
    spread = math.sqrt(float(np.mean(drawn**2)))
    bound = PINELIS * math.erfc(abs(observed) / spread / math.sqrt(2)) if spread else 1.0
    return min(p, max(bound, 2.0 ** (1 - groups)))


def exchanges_for(numbers: float) -> int:
    """How many exchanges can be paid for where each costs so many numbers of a metric.

    >>> exchanges_for(1e5), exchanges_for(1e9)
    (1999, 199)
    """
    low, high = EXCHANGES
    return int(min(high, max(low, EXCHANGED_NUMBERS / numbers)))


def least_groups(tests: int) -> int:
    """The fewest groups with which one of so many tests can be significant after Holm's correction.

    >>> least_groups(1), least_groups(3), least_groups(31)
    (6, 7, 11)
    """
    return 1 + math.ceil(math.log2(max(tests, 1) / SIGNIFICANT))


def signed_rank_p(differences: Float[ndarray, "pairs"]) -> float:
    """Wilcoxon's signed-rank test, two-sided: are paired differences as often and as far above zero as below?

    Pairs without a difference are left out, as Wilcoxon did.

    >>> round(signed_rank_p(np.array([0.3, 0.1, 0.4, 0.2, 0.5, 0.6])), 4)
    0.0312
    """
    import scipy.stats

    d = differences[np.isfinite(differences)]
    if not d.any():
        return 1.0
    # 0.6 - 0.4 and 0.4 - 0.2 are the same difference, though not the same floating-point number
    d = np.round(d / np.abs(d).max(), 9)
    return float(scipy.stats.wilcoxon(d[d != 0]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p-values.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def merged(groups: Int[ndarray, "units"], most: int, seed: int = 0) -> Int[ndarray, "units"]:
    """The group of each unit, groups thrown together at random where there are more than so many."""
    count = int(groups.max()) + 1
    if count <= most:
        return groups
    return (np.random.default_rng(seed).permutation(count) % most)[groups]
