"""What a comparison found: plain data that reports, the command line and Python read alike."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Generic, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import cenote.core.files as files
from cenote.compare import table
from cenote.compare.words import Words
from cenote.core.errors import InputError
from cenote.core.json_text import json_text

FILE = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm over all its seeds. A job adds what it measures besides.

    Attributes:
        method: the arm's name.
        summary: one line for people.
        settings: what makes the arm this arm.
        metric: mean over the seeds.
        interval: 95 % interval of `metric` on other units (whole groups where there are groups), see
            `cenote.compare.intervals`; NaN where it cannot be known, as with one group.
        metric_per_seed: one number per seed.
        seconds: that measuring it took.
        control: whether it must lose.
        reference: whether it only shows what the usual alternative scores.
        metric_per_fold: mean over the seeds in each fold, where there are folds.
    """

    method: str
    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    metric: float
    interval: tuple[float, float]
    metric_per_seed: tuple[float, ...]
    seconds: float
    control: bool = False
    reference: bool = False
    metric_per_fold: tuple[float, ...] = ()

    @property
    def cost(self) -> float | None:
        """What the Pareto set weighs against the metric; `None` where nothing is."""
        return None


@dataclass(frozen=True)
class PairTest:
    """Paired comparison of two arms on the same units.

    Attributes:
        first, second: names of arms.
        difference: metric of `first` minus metric of `second`.
        interval: 95 % interval of `difference`; NaN where it cannot be known.
        p_value: two-sided, from exchanges of the two arms, from Wilcoxon's test or, of folds, from the corrected resampled t
            test: `provenance["significance"]` says which.
        p_adjusted: after Holm's correction, over the comparisons with the baseline or over all pairs. That of a pair is never
            below the least of those with the baseline, so that the whole table raises a false alarm no more often than one
            comparison would. Tests of references are families of their own: whether there are any changes no other p-value.
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    p_adjusted: float

    def seen_from(self, arm: str) -> PairTest:
        """The same with this arm first."""
        if arm == self.first:
            return self
        low, high = self.interval
        return dataclasses.replace(
            self, first=self.second, second=self.first, difference=-self.difference, interval=(-high, -low)
        )


R = TypeVar("R", bound=ArmResult)


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Generic[R]):
    """The whole verdict. A job names its class of results, and adds what it knows besides.

    Attributes:
        metric_name: what arms are compared by; higher is better.
        results: best first, controls and references among them.
        skipped: arm -> why it could not be measured.
        baseline: the arm that the others are compared with.
        winner: the best arm that is no control and no reference.
        against_baseline: paired tests, Holm-corrected over them.
        against_winner, pairs: those with the winner, and all pairs; Holm-corrected over all pairs.
        pareto: names of the arms that no other beats in both metric and cost; references stand aside.
        sentence: the verdict in plain words.
        recommended: the cheapest arm that cannot be told from the winner.
        reason: why it is recommended.
        no_verdict: why these units cannot carry a verdict; empty where they can.
        cautions: what a person should know before believing it, one sentence each.
        provenance: versions, machine, command, when, and what the job adds.
        complete: False where the run was interrupted and arms are missing.
    """

    result_type: ClassVar[type[Any]] = ArmResult

    metric_name: str
    results: tuple[R, ...]
    skipped: dict[str, str]
    baseline: str
    winner: str
    against_baseline: tuple[PairTest, ...]
    against_winner: tuple[PairTest, ...]
    pairs: tuple[PairTest, ...]
    pareto: tuple[str, ...]
    sentence: str
    provenance: dict[str, Any] = field(default_factory=dict)
    complete: bool = True
    recommended: str = ""
    reason: str = ""
    no_verdict: str = ""
    cautions: tuple[str, ...] = ()

    @property
    def words(self) -> Words:
        """How the sentence calls things."""
        return Words()

    @property
    def controls(self) -> tuple[str, ...]:
        """The arms that must lose."""
        return tuple(r.method for r in self.results if r.control)

    @property
    def references(self) -> tuple[str, ...]:
        """The arms that only show what the usual alternative scores."""
        return tuple(r.method for r in self.results if r.reference)

    def __getitem__(self, method: str) -> R:
        """The result of one arm."""
        for result in self.results:
            if result.method == method:
                return result
        raise KeyError(f"{method!r} was not compared; there are {[r.method for r in self.results]}")

    def __repr__(self) -> str:
        best = ", ".join(f"{r.method} {r.metric:.3f}" for r in self.results[:3])
        more = f", and {len(self.results) - 3} more" if len(self.results) > 3 else ""
        return f"<{type(self).__name__} by {self.metric_name}: {best}{more}>"

    def __str__(self) -> str:
        return self.sentence

    def _repr_html_(self) -> str:
        return table.to_html(self)

    def to_rows(self) -> list[dict[str, Any]]:
        """One dictionary an arm, best first, see `cenote.compare.table.rows`."""
        return table.rows(self)

    def to_frame(self) -> Any:
        """The rows as a `pandas.DataFrame`, by method.

        Raises:
            InputError: where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise InputError("to_frame: needs pandas; install it, or take to_rows or to_csv") from None
        return pandas.DataFrame(self.to_rows()).set_index("method")

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as CSV, with a header line; also written to `path`, if given."""
        return self._written(table.to_csv(self), path)

    def to_jsonl(self, path: str | Path | None = None) -> str:
        """The rows as JSON lines, an object an arm; also written to `path`, if given."""
        return self._written(table.to_jsonl(self), path)

    def _written(self, text: str, path: str | Path | None) -> str:
        if path is not None:
            files.require_place(Path(path), "path")
            try:
                files.write_whole(Path(path), text)
            except OSError as error:
                raise InputError(f"path: cannot write {path}: {error.strerror}; name another place") from None
        return text

    def to_latex(self, columns: Sequence[str] | None = None) -> str:
        """The rows as a `tabular` (booktabs), the winner in bold, see `cenote.compare.table.to_latex`."""
        return table.to_latex(self, columns)

    def to_json(self) -> str:
        """The comparison as text; `from_json` reads it back."""
        return json_text(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: where the text is something else.
        """
        return cls._from(json.loads(text))

    @classmethod
    def _from(cls, raw: Any) -> Self:
        if not isinstance(raw, dict):
            raise TypeError(f"expected an object, got {type(raw).__name__}")
        raw["results"] = tuple(_rebuild(cls.result_type, r) for r in raw["results"])
        for name in ("against_baseline", "against_winner", "pairs"):
            raw[name] = tuple(_rebuild(PairTest, p) for p in raw[name])
        found: Self = _rebuild(cls, raw)
        return found

    @classmethod
    def load(cls, out: Path) -> Self:
        """Read `comparison.json` of an output folder.

        Raises:
            KeyError, TypeError, ValueError: where the file is something else, or was changed.
        """
        path = Path(out) / FILE
        raw = files.read_json(path)
        return cls._from(files.opened(raw, path) if isinstance(raw, dict) else raw)

    def save(self, out: Path) -> None:
        """Write `comparison.json` of an output folder; `load` reads it back."""
        content = files.sealed(dataclasses.asdict(self))
        files.write_whole(Path(out) / FILE, json.dumps(content, indent=1, allow_nan=False))


def as_tuple(value: Any) -> Any:
    """Lists as tuples, at every depth: JSON knows no tuples."""
    return tuple(as_tuple(v) for v in value) if isinstance(value, list | tuple) else value


def _rebuild(cls: type[Any], raw: dict[str, Any]) -> Any:
    # what stays a dictionary or a list is not asked for as a tuple
    given = {k: as_tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    for name, kind in get_type_hints(cls).items():
        if name in given:
            given[name] = _nan_for_null(given[name], kind)
        if name in given and not _is(given[name], kind):
            raise TypeError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {given[name]!r}")
    return cls(**given)


def _nan_for_null(value: Any, kind: Any) -> Any:
    """Where a number belongs, of a kind, it is NaN.

    >>> _nan_for_null((None, 1.0), tuple[float, float]), _nan_for_null(None, float | None)
    ((nan, 1.0), None)
    """
    if kind is float and value is None:
        return math.nan
    if get_origin(kind) is tuple and isinstance(value, tuple):
        (inner, *_) = get_args(kind)
        return tuple(_nan_for_null(v, inner) for v in value)
    return value


def _is(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a kind: pages do arithmetic with it.

    >>> _is((0.5, 1), tuple[float, ...]), _is("0.5", float), _is(None, float | None)
    (True, False, True)
    """
    origin, parts = get_origin(kind) or kind, [p for p in get_args(kind) if p is not Ellipsis]
    if origin in (Union, UnionType):
        return any(_is(value, p) for p in parts)
    if origin is tuple:
        return isinstance(value, tuple) and all(any(_is(v, p) for p in parts) for v in value)
    return not isinstance(origin, type) or isinstance(value, (int, float) if origin is float else origin)
