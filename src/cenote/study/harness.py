"""What every study shares: arms measured over seeds, checks decided by an interval, a verdict.

A study is a module with a docstring and one function:

- the docstring's first paragraph is the claim, the paragraph that begins with "Refuted if" is the rule;
- `run(seed, size)` returns `Findings`, and `@study` turns them into a `Verdict`.

No verdict is typed by hand: each check compares a 95 % interval over seeds with bounds that are written down beforehand.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.core.version import __version__

Size = Literal["smoke", "small", "full"]
Holds = Literal["holds", "does not hold", "not decidable at this scale"]
Figure = Callable[[Any], None]
Bounds = tuple[float | None, float | None]

HOLDS: Holds = "holds"
REFUTED: Holds = "does not hold"
UNDECIDED: Holds = "not decidable at this scale"
SIZES: tuple[Size, ...] = get_args(Size)
CONFIDENCE = 0.95
REFUTED_IF = "Refuted if"
SMOKE_NOTE = "A smoke run only shows that the study runs: it trains too little to decide anything."


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


@dataclass(frozen=True)
class Findings:
    """What a study's `run` returns.

    Attributes:
        seeds: the seeds that were run.
        checks: the first of them gives the verdict its effect.
        table: rows for people, one `dict` each.
        figure: draws the result onto a matplotlib figure.
        notes: what a reader must know to judge the verdict.
        tried: what else was tried on the way to these settings, with what came out.
    """

    seeds: tuple[int, ...]
    checks: tuple[Check, ...]
    table: list[dict[str, Any]]
    figure: Figure
    notes: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether a published claim shows here.

    Attributes:
        slug: the system.
        claim: what was checked.
        rule: what refutes it.
        holds: decided by the checks that are part of the rule.
        effect, interval: of the first check.
        seeds, checks, table, notes, tried: as in `Findings`.
        figure: draws onto a matplotlib figure; of a stored verdict, the name of the file beside it.
        size: how much was run.
        seconds: CPU seconds.
        provenance: versions.
    """

    slug: str
    claim: str
    rule: str
    holds: Holds
    effect: float
    interval: tuple[float, float]
    seeds: tuple[int, ...]
    checks: tuple[Check, ...]
    table: list[dict[str, Any]]
    figure: Figure | str
    size: Size
    seconds: float
    notes: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    provenance: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The verdict as text; `from_json` reads it back."""
        stored = dataclasses.replace(self, figure=self.figure if isinstance(self.figure, str) else f"{self.slug}.svg")
        return json.dumps(dataclasses.asdict(stored), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """Inverse of `to_json`."""
        raw = json.loads(text)
        raw["checks"] = tuple(_check_from(c) for c in raw["checks"])
        for name in ("interval", "seeds", "notes", "tried"):
            raw[name] = tuple(raw[name])
        return cls(**raw)


def study(run: Callable[[int, Size], Findings]) -> Callable[[int, Size], Verdict]:
    """Make a study's `run` return a `Verdict`: claim and rule from the module's docstring, the decision from its checks.

    The caller's random numbers are left as they were.
    """
    slug = run.__module__.rpartition(".")[2].replace("_", "-")

    @functools.wraps(run)
    def timed(seed: int, size: Size) -> Verdict:
        require_one_of(SIZES, size=size)
        claim, rule = claim_and_rule(sys.modules[run.__module__].__doc__ or "")
        start = time.process_time()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = run(seed, size)
        if size == "smoke":
            found = _undecided(found)
        return Verdict(
            slug=slug,
            claim=claim,
            rule=rule,
            holds=decide(found.checks),
            effect=found.checks[0].effect,
            interval=found.checks[0].interval,
            seeds=found.seeds,
            checks=found.checks,
            table=found.table,
            figure=found.figure,
            size=size,
            seconds=time.process_time() - start,
            notes=found.notes,
            tried=found.tried,
            provenance=_provenance(),
        )

    return timed


def claim_and_rule(docstring: str) -> tuple[str, str]:
    """The first paragraph, and the one that begins with "Refuted if".

    >>> claim_and_rule("More is better.\\n\\nRefuted if\\nless is better.")
    ('More is better.', 'Refuted if less is better.')
    """
    paragraphs = [" ".join(p.split()) for p in inspect.cleandoc(docstring).split("\n\n")]
    rules = [p for p in paragraphs if p.startswith(REFUTED_IF)]
    if not rules:
        raise InputError(f'docstring: a study needs a claim and a paragraph that begins with "{REFUTED_IF}"')
    return paragraphs[0], rules[0]


def seeds_of(seed: int, size: Size, *, small: int = 5, full: int = 10) -> tuple[int, ...]:
    """The seeds of a run: 2 for a smoke test, else as said.

    >>> seeds_of(3, "smoke")
    (3, 4)
    """
    count = {"smoke": 2, "small": small, "full": full}[size]
    return tuple(range(seed, seed + count))


def draw_arms(axes: Any, arms: Arms, xlabel: str) -> None:
    """One line per arm: a dot per seed, and the mean with its 95 % interval."""
    for y, (_, values) in enumerate(arms.items()):
        low, high = t_interval(values)
        mean = float(np.mean(values))
        axes.plot(values, [y] * len(values), "o", color="#9aa0a6", markersize=4, zorder=1)
        axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="D", color="#0b57d0", markersize=5, capsize=3)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(axes: Any, by_x: Mapping[int, Arms], xlabel: str, ylabel: str) -> None:
    """One curve per arm over the numbers that `by_x` has arms for, in powers of 2: the mean and its 95 % interval."""
    at = list(by_x)
    for name in by_x[at[0]]:
        means = [float(np.mean(by_x[n][name])) for n in at]
        low, high = zip(*(t_interval(by_x[n][name]) for n in at), strict=True)
        (line,) = axes.plot(at, means, "o-", markersize=4, label=name)
        axes.fill_between(at, low, high, alpha=0.2, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(n) for n in at])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def draw_picture(axes: Any, picture: Float[Tensor, "height width *colours"], title: str, **settings: Any) -> None:
    """An image without axes; `settings` as of matplotlib's `imshow`."""
    axes.imshow(picture.numpy(), **settings)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


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


def _check_from(raw: dict[str, Any]) -> Check:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Check(**fields)


def _undecided(found: Findings) -> Findings:
    checks = tuple(dataclasses.replace(c, holds=UNDECIDED) for c in found.checks)
    return dataclasses.replace(found, checks=checks, notes=(*found.notes, SMOKE_NOTE))


def _provenance() -> dict[str, str]:
    import platform

    return {"cenote": __version__, "torch": torch.__version__, "python": platform.python_version()}
