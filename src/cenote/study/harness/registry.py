"""Rules are registered before they are tried: one lock file per study, with every rule that it has had.

`study/registered/SLUG.toml` is a list of entries; the last one is in force. A change adds an entry, and never edits one.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import tomli_w

from cenote.core import InputError, files
from cenote.study.harness.checks import Check, bounds, effect
from cenote.study.harness.rules import Gate, KnockedOut

FOLDER = Path(__file__).resolve().parents[1] / "registered"
HARNESS = __name__.rpartition(".")[0]
PLAIN = (bool, int, float)


@dataclass(frozen=True)
class Entry:
    """What was laid down on a day.

    Attributes:
        date: of the day.
        reason: why it is here: what changed against the entry before, and why.
        claim, rule: in words, as the study's docstring has them.
        bounds: of every check in the rule.
        knocked_out: the knock-outs, each of which must fail.
        gates: what every arm must reach before the rule is read.
        seeds: how many, by size.
        settings: the numbers that the study and its tasks are made with: sizes, steps, rates.
        seen: results that were known when the entry was made.
    """

    date: str
    reason: str
    claim: str
    rule: str
    bounds: tuple[str, ...]
    knocked_out: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    seeds: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seen: tuple[str, ...] = ()

    def differs_from(self, other: Entry) -> tuple[str, ...]:
        """Names of what is not the same; dates, reasons and results do not count."""
        laid_down = ("claim", "rule", "bounds", "knocked_out", "gates", "seeds")
        names = [n for n in laid_down if getattr(self, n) != getattr(other, n)]
        both = sorted({*self.settings, *other.settings})
        return (*names, *(n for n in both if self.settings.get(n) != other.settings.get(n)))


def history(slug: str) -> tuple[Entry, ...]:
    """The entries of a study, the one in force last; none where nothing is registered.

    Raises:
        InputError: where the file is no list of entries.
    """
    file = FOLDER / f"{slug}.toml"
    if not file.is_file():
        return ()
    try:
        raw: list[dict[str, Any]] = tomllib.loads(file.read_text("utf-8"))["entry"]
        return tuple(
            Entry(**dict[str, Any]((k, tuple(v) if isinstance(v, list) else v) for k, v in e.items())) for e in raw
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: is not a list of entries ({error}); see cenote/study/harness/registry.py") from error


def entry_of(
    module: ModuleType,
    claim: str,
    rule: str,
    seeds: Mapping[str, int],
    checks: Sequence[Check],
    knocked_out: Sequence[KnockedOut] = (),
    gates: Sequence[Gate] = (),
) -> Entry:
    """The entry that a study as it is now would have."""
    return Entry(
        date="",
        reason="",
        claim=claim,
        rule=rule,
        bounds=tuple(f"{c.what}: {bounds(c, repr)}" for c in checks if c.in_rule),
        knocked_out=tuple(dict.fromkeys(k.arm for k in knocked_out)),
        gates=tuple(_gate(g) for g in gates),
        seeds=dict(seeds),
        settings=settings_of(module),
    )


def differences(slug: str, now: Entry) -> tuple[str, ...]:
    """What a study now has otherwise than its entry in force, by name; "no entry" where it has none."""
    entries = history(slug)
    return entries[-1].differs_from(now) if entries else ("no entry",)


def add(slug: str, now: Entry, date: str, reason: str, seen: Sequence[str] = ()) -> Path:
    """Put an entry below those that are there.

    Raises:
        InputError: where nothing has changed, or no reason is given.
    """
    if not reason.strip():
        raise InputError("reason: say why the rule is what it is now, got an empty text")
    entries = history(slug)
    if entries and not entries[-1].differs_from(now):
        raise InputError(f"SLUG: {slug!r} is registered as it is; there is nothing to add")
    new = dataclasses.replace(now, date=date, reason=reason, seen=tuple(seen))
    file = FOLDER / f"{slug}.toml"
    old = file.read_text("utf-8").rstrip("\n") + "\n\n" if file.is_file() else ""
    files.write_whole(file, old + to_toml(new))
    return file


def seen_in(holds: str, checks: Sequence[Check]) -> tuple[str, ...]:
    """A result in a few lines, for the entry that follows it."""
    return (holds, *(f"{c.what}: {effect(c)}: {c.holds}" for c in checks if c.in_rule))


def settings_of(module: ModuleType) -> dict[str, Any]:
    """The numbers among the constants of a study, and of the modules of the harness that it has functions or classes from."""
    shared: dict[str, Any] = {}
    homes = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
    for home in sorted(homes):
        if home.startswith(f"{HARNESS}.") and home != module.__name__:
            stem = home.rpartition(".")[2]
            shared |= {f"{stem}.{name}": value for name, value in numbers(vars(sys.modules[home])).items()}
    return numbers(vars(module)) | shared


def numbers(constants: Mapping[str, Any]) -> dict[str, Any]:
    """Those in capitals that are numbers, or tuples and dicts of numbers, as they come back from the file.

    >>> numbers({"STEPS": {"small": 3}, "SHARES": (0.5, 1.0), "ARM": "mean", "n": 1})
    {'STEPS': {'small': 3}, 'SHARES': [0.5, 1.0]}
    """
    named = [(n, v) for n, v in constants.items() if re.fullmatch(r"[A-Z][A-Z0-9_]*", n) and n != "SEEDS"]
    return {n: _listed(v) for n, v in named if _plain(v)}


def to_toml(entry: Entry) -> str:
    """An entry as text."""
    told = {name: value for name, value in dataclasses.asdict(entry).items() if value or name in ("bounds", "reason")}
    return tomli_w.dumps({"entry": [told]})


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_plain(v) for v in value)
    return isinstance(value, PLAIN)


def _listed(value: Any) -> Any:
    """As it comes back from the file."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (tuple, list)) else value


def _gate(g: Gate) -> str:
    level = "may lie at any level" if g.beats is None else f"{g.beats.what}: {bounds(g.beats, repr)}"
    stops = "" if g.last_fifth is None else f"; the last fifth brings at most {g.allowed!r} of the gain"
    return f"{g.arm}: {level}{stops}"
