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
from typing import Any, Literal, get_args

import torch

from cenote.compare.sources import source_digest
from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.core.version import __version__
from cenote.study.harness.checks import UNDECIDED, Check, Holds, decide

Size = Literal["smoke", "small", "full"]
Figure = Callable[[Any], None]

SIZES: tuple[Size, ...] = get_args(Size)
REFUTED_IF = "Refuted if"
SMOKE_NOTE = "A smoke run only shows that the study runs: it trains too little to decide anything."


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
        provenance: versions; under "source" the digest of the code that measured it, which the oldest results lack.
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
            provenance=_provenance() | {"source": source_digest(sys.modules[run.__module__])},
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


def _check_from(raw: dict[str, Any]) -> Check:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Check(**fields)


def _undecided(found: Findings) -> Findings:
    checks = tuple(dataclasses.replace(c, holds=UNDECIDED) for c in found.checks)
    return dataclasses.replace(found, checks=checks, notes=(*found.notes, SMOKE_NOTE))


def _provenance() -> dict[str, str]:
    import platform

    return {"cenote": __version__, "torch": torch.__version__, "python": platform.python_version()}
