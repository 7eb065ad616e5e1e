"""What a study returns, and the verdict that follows from it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch

import cenote.core.files as files
from cenote.compare.sources import source_digest
from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.core.version import __version__
from cenote.study.harness.checks import HOLDS, UNDECIDED, Check
from cenote.study.harness.registry import differences, entry_of
from cenote.study.harness.rules import (
    UNREGISTERED,
    UNTRAINED,
    WITHOUT,
    Gate,
    KnockedOut,
    Part,
    Ruling,
    knock_out,
    require_able_to_fail,
    ruled,
)

Size = Literal["smoke", "small", "full"]
Figure = Callable[[Any], None]

SIZES: tuple[Size, ...] = get_args(Size)
REFUTED_IF = "Refuted if"
SEEDS: dict[str, int] = {"small": 5, "full": 10}
SINCE_KNOCK_OUTS = ("knocked_out", "gates", "unregistered")
BY_OLD_RULE = "holds by its old rule; not yet tried with a knock-out"
SMOKE_NOTE = "A smoke run only shows that the study runs: it trains too little to decide anything."


@dataclass(frozen=True)
class Findings:
    """What a study's `run` returns.

    Attributes:
        seeds: the seeds that were run.
        checks: besides those of `parts`, which come before them: what no knock-out belongs to. The first of all gives the
            verdict its effect.
        table: rows for people, one `dict` each.
        figure: draws the result onto a matplotlib figure.
        notes: what a reader must know to judge the verdict.
        tried: what else was tried on the way to these settings, with what came out.
        parts: of the rule, each with the knock-outs that must break it.
        gates: one for every arm that the parts compare.
    """

    seeds: tuple[int, ...]
    checks: tuple[Check, ...]
    table: list[dict[str, Any]]
    figure: Figure
    notes: tuple[str, ...] = ()
    tried: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether a published claim shows here.

    Attributes:
        slug: the system.
        claim: what was checked.
        rule: what refutes it.
        holds: decided by the checks that are part of the rule, by the knock-outs and by the gates.
        effect, interval: of the first check.
        seeds, checks, table, notes, tried: as in `Findings`.
        figure: draws onto a matplotlib figure; of a stored verdict, the name of the file beside it.
        size: how much was run.
        seconds: CPU seconds.
        provenance: versions; under "source" the digest of the code that measured it, which the oldest results lack.
        knocked_out: the same rule with each knock-out in the method's place; none where the study names none yet.
        gates: whether each arm was trained.
        unregistered: what was otherwise than the rule that is registered.
        sealed: whether it carries its digest when it is stored, which older results lack.
    """

    slug: str
    claim: str
    rule: str
    holds: Ruling
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
    knocked_out: tuple[KnockedOut, ...] = ()
    gates: tuple[Gate, ...] = ()
    unregistered: tuple[str, ...] = ()
    sealed: bool = True

    @property
    def said(self) -> str:
        """The verdict for people: with what decided it, and never "holds" where no knock-out was tried."""
        if self.holds == HOLDS and not self.knocked_out:
            return BY_OLD_RULE
        why = {
            WITHOUT: [k.arm for k in self.knocked_out if k.holds == HOLDS],
            UNTRAINED: list(dict.fromkeys(g.arm for g in self.gates if not g.passed)),
            UNREGISTERED: list(self.unregistered),
        }.get(self.holds)
        return f"{self.holds} ({'; '.join(why)})" if why else self.holds

    def to_json(self) -> str:
        """The verdict as text; `from_json` reads it back."""
        stored = dataclasses.replace(self, figure=self.figure if isinstance(self.figure, str) else f"{self.slug}.svg")
        raw = dataclasses.asdict(stored)
        del raw["sealed"]
        # a result from before there were knock-outs stays as it was written
        kept = {name: value for name, value in raw.items() if value or name not in SINCE_KNOCK_OUTS}
        return json.dumps(files.sealed(kept) if self.sealed else kept, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: where the text is something else, or was changed.
        """
        raw = json.loads(text)
        sealed = files.DIGEST in raw
        raw = {**(files.opened(raw) if sealed else raw), "sealed": sealed}
        raw["checks"] = tuple(_check_from(c) for c in raw["checks"])
        raw["knocked_out"] = tuple(
            KnockedOut(k["arm"], k["holds"], tuple(map(_check_from, k["checks"]))) for k in raw.get("knocked_out", ())
        )
        raw["gates"] = tuple(
            Gate(**(g | {"beats": None if g["beats"] is None else _check_from(g["beats"])}))
            for g in raw.get("gates", ())
        )
        for name in ("interval", "seeds", "notes", "tried", "unregistered"):
            raw[name] = tuple(raw.get(name, ()))
        return cls(**raw)


def study(run: Callable[[int, Size], Findings]) -> Callable[[int, Size], Verdict]:
    """Make a study's `run` return a `Verdict`: claim and rule from the module's docstring, the decision from its checks.

    The caller's random numbers are left as they were.
    """
    slug = run.__module__.rpartition(".")[2].replace("_", "-")

    @functools.wraps(run)
    def timed(seed: int, size: Size) -> Verdict:
        require_one_of(SIZES, size=size)
        module = sys.modules[run.__module__]
        claim, rule = claim_and_rule(module.__doc__ or "")
        start = time.process_time()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = run(seed, size)
        checks = (*(c for part in found.parts for c in part.checks(part.method)), *found.checks)
        knocked_out = tuple(k for part in found.parts for k in knock_out(part))
        if found.parts:
            require_able_to_fail(found.parts, found.gates)
        now = entry_of(module, claim, rule, seeds_by_size(module), checks, knocked_out, found.gates)
        others: tuple[str, ...] = ()
        if found.parts and size != "smoke":
            others = differences(slug, now)
            if len(found.seeds) != now.seeds[size]:
                others = (*others, f"{len(found.seeds)} seeds")
        verdict = Verdict(
            slug=slug,
            claim=claim,
            rule=rule,
            holds=ruled(checks, knocked_out, found.gates, others),
            effect=checks[0].effect,
            interval=checks[0].interval,
            seeds=found.seeds,
            checks=checks,
            table=found.table,
            figure=found.figure,
            size=size,
            seconds=time.process_time() - start,
            notes=found.notes,
            tried=found.tried,
            provenance=_provenance() | {"source": source_digest(module)},
            knocked_out=knocked_out,
            gates=found.gates,
            unregistered=others,
        )
        return _undecided(verdict) if size == "smoke" else verdict

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


def seeds_of(seed: int, size: Size, *, small: int = SEEDS["small"], full: int = SEEDS["full"]) -> tuple[int, ...]:
    """The seeds of a run: 2 for a smoke test, else as said.

    >>> seeds_of(3, "smoke")
    (3, 4)
    """
    count = {"smoke": 2, "small": small, "full": full}[size]
    return tuple(range(seed, seed + count))


def seeds_by_size(module: ModuleType) -> dict[str, int]:
    """How many seeds a study has, by size: its own `SEEDS`, or those of the house."""
    return dict(getattr(module, "SEEDS", SEEDS))


def _check_from(raw: dict[str, Any]) -> Check:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Check(**fields)


def _undecided(verdict: Verdict) -> Verdict:
    def left_open(checks: tuple[Check, ...]) -> tuple[Check, ...]:
        return tuple(dataclasses.replace(c, holds=UNDECIDED) for c in checks)

    return dataclasses.replace(
        verdict,
        holds=UNDECIDED,
        checks=left_open(verdict.checks),
        knocked_out=tuple(KnockedOut(k.arm, UNDECIDED, left_open(k.checks)) for k in verdict.knocked_out),
        notes=(*verdict.notes, SMOKE_NOTE),
    )


def _provenance() -> dict[str, str]:
    import platform

    return {"cenote": __version__, "torch": torch.__version__, "python": platform.python_version()}
