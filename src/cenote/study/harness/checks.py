"""Arms measured over seeds, and checks that an interval over the seeds decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cenote.core import InputError

Holds = Literal["holds", "does not hold", "not decidable at this scale"]
Bounds = tuple[float | None, float | None]

HOLDS: Holds = "holds"
REFUTED: Holds = "does not hold"
UNDECIDED: Holds = "not decidable at this scale"
CONFIDENCE = 0.95


class Arms(dict[str, tuple[float, ...]]):
    """What was measured: arm -> one number per seed, the seeds in the same order in every arm.

    Example:
        >>> arms = Arms(mean=(0.7, 0.8), simpool=(0.9, 0.9))
        >>> [round(d, 3) for d in arms.minus("simpool", "mean")]
        [0.2, 0.1]
        >>> [(row["arm"], round(row["mean"], 3)) for row in arms.table("accuracy")]
        [('mean', 0.75), ('simpool', 0.9)]
    """

    def minus(self, first: str, second: str) -> tuple[float, ...]:
        """Paired differences: both arms saw the same data, draws and order in each seed."""
        return tuple(a - b for a, b in zip(self[first], self[second], strict=True))

    def table(self, metric: str, **columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One row per arm: its mean, 95 % interval and the number of each seed; `columns` maps arms to more values."""
        rows = []
        for arm, values in self.items():
            low, high = t_interval(values)
            row: dict[str, Any] = {
                "arm": arm,
                "metric": metric,
                "mean": float(np.mean(values)),
                "low": low,
                "high": high,
            }
            row |= {name: by_arm.get(arm, "") for name, by_arm in columns.items()}
            rows.append({**row, "per seed": list(values)})
        return rows


@dataclass(frozen=True)
class Check:
    """One part of a rule: an interval over seeds against what is expected and what would refute.

    Attributes:
        what: what was measured, for people.
        effect: mean over the seeds.
        interval: 95 % t interval of `effect` over the seeds.
        expected: `(low, high)`: the check holds where the whole interval lies inside.
        tolerated: `(low, high)`, around `expected`: the check is refuted where the whole interval lies outside. `None` as a
            bound: unbounded.
        holds: decided from these.
        in_rule: whether the verdict depends on it; otherwise it is reported only.
    """

    what: str
    effect: float
    interval: tuple[float, float]
    expected: Bounds
    tolerated: Bounds
    holds: Holds
    in_rule: bool = True


def above(
    what: str, values: Sequence[float], expected: float, refuted: float | None = None, *, in_rule: bool = True
) -> Check:
    """Holds where the interval lies above `expected`, is refuted where it lies at or below `refuted`.

    `refuted` is the same number by default; with `-inf` the check can fail to hold, but not refute.
    """
    return _check(what, values, (expected, None), (_bound(expected if refuted is None else refuted), None), in_rule)


def below(
    what: str, values: Sequence[float], expected: float, refuted: float | None = None, *, in_rule: bool = True
) -> Check:
    """Holds where the interval lies below `expected`, is refuted where it lies at or above `refuted`.

    `refuted` is the same number by default; with `inf` the check can fail to hold, but not refute.
    """
    return _check(what, values, (None, expected), (None, _bound(expected if refuted is None else refuted)), in_rule)


def between(what: str, values: Sequence[float], low: float, high: float, *, in_rule: bool = True) -> Check:
    """Holds where the interval lies between `low` and `high`, is refuted where it lies outside."""
    return _check(what, values, (low, high), (low, high), in_rule)


def decide(checks: Sequence[Check]) -> Holds:
    """A claim holds where every check of its rule holds, and does not hold where any of them is refuted."""
    rule = [c.holds for c in checks if c.in_rule]
    if not rule:
        raise InputError("checks: expected at least one that is part of the rule")
    if REFUTED in rule:
        return REFUTED
    return HOLDS if all(h == HOLDS for h in rule) else UNDECIDED


def decided(interval: tuple[float, float], expected: Bounds, tolerated: Bounds) -> Holds:
    """Holds with the whole interval inside `expected`, refuted with the whole interval outside `tolerated`."""
    (low, high), (floor, ceiling), (least, most) = interval, expected, tolerated
    if (floor is None or floor < low) and (ceiling is None or high < ceiling):
        return HOLDS
    if (least is not None and high <= least) or (most is not None and low >= most):
        return REFUTED
    return UNDECIDED


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t over the seeds.

    >>> [round(v, 3) for v in t_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    import scipy.stats

    if len(values) < 2:
        raise InputError(f"values: an interval over seeds needs at least 2 seeds, got {len(values)}")
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * error
    return mean - reach, mean + reach


def short(number: float) -> str:
    """For people: three decimals, or three digits.

    >>> short(0.12345), short(0.012345), short(1234.5)
    ('0.123', '0.0123', '1,234.5')
    """
    return f"{number:,.3f}".rstrip("0").rstrip(".") if 0.1 <= abs(number) < 10_000 else f"{number:.3g}"


def effect(check: Check) -> str:
    """The measured number and its interval.

    >>> effect(above("difference", [0.1, 0.2], expected=0.0))
    '0.15 (-0.485 to 0.785)'
    """
    return f"{short(check.effect)} ({short(check.interval[0])} to {short(check.interval[1])})"


def bounds(check: Check, number: Callable[[float], str] = short) -> str:
    """What was expected, in words; `number` writes the numbers.

    >>> bounds(above("difference", [0.1, 0.2], expected=0.1, refuted=0.02))
    'above 0.1; refuted at or below 0.02'
    """
    (low, high), (least, most) = check.expected, check.tolerated
    if low is not None and high is not None:
        return f"between {number(low)} and {number(high)}"
    if low is not None:
        return f"above {number(low)}" + ("" if least is None else f"; refuted at or below {number(least)}")
    assert high is not None
    return f"below {number(high)}" + ("" if most is None else f"; refuted at or above {number(most)}")


def _bound(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _check(
    what: str,
    values: Sequence[float],
    expected: Bounds,
    tolerated: Bounds,
    in_rule: bool,
) -> Check:
    if not np.isfinite(values).all():
        raise InputError(f"{what}: expected finite numbers, got {list(values)}")
    for inner, outer, sign in ((expected[0], tolerated[0], 1), (expected[1], tolerated[1], -1)):
        if outer is not None and (inner is None or sign * outer > sign * inner):
            raise InputError(f"{what}: what refutes must lie outside what is expected, got {tolerated} and {expected}")
    interval = t_interval(values)
    holds = decided(interval, expected, tolerated)
    return Check(what, float(np.mean(values)), interval, expected, tolerated, holds, in_rule)
