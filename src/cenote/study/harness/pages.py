"""Verdicts as Markdown: one page per study, and the scoreboard over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from cenote.catalog import System, systems
from cenote.study.harness.checks import HOLDS, REFUTED, UNDECIDED, Check, decided
from cenote.study.harness.verdict import Verdict

COMMAND = "cenote study"
EARLIER = "Measured by earlier code"
NOT_KNOWN = "Measured by code of which no digest was kept"


def page(verdict: Verdict, earlier: bool = False) -> str:
    """The page of one study; `earlier` where it was not measured by the code that is here now, as far as is known."""
    system = next(s for s in systems() if s.slug == verdict.slug)
    lines = [
        f"# {system.title}",
        "",
        f"Row {system.row}, `{verdict.slug}`, {system.year}, {system.paper}. "
        f"Written by `{COMMAND} {verdict.slug} --size {verdict.size}`; do not edit.",
        "",
        f"**Claim.** {verdict.claim}",
        "",
        f"**Rule.** {verdict.rule}",
        "",
        f"**Verdict: {verdict.holds}.** {verdict.checks[0].what}: {effect(verdict.checks[0])}, "
        f"{len(verdict.seeds)} seeds, {verdict.seconds:.0f} CPU seconds, size {verdict.size}.",
        *(("", _measured_by(verdict)) if earlier else ()),
        "",
        f"![{verdict.checks[0].what} and the arms of the study]({verdict.figure})",
        "",
        "## Checks",
        "",
        "Each compares a 95 % t interval over the seeds with bounds that were fixed beforehand.",
        "",
        *_table(
            ("check", "measured (95 % interval)", "expected", "part of the rule", "outcome"),
            [
                (c.what, effect(c), bounds(c), "yes" if c.in_rule else "no, reported only", outcome(c))
                for c in verdict.checks
            ],
        ),
        "",
        "## Numbers",
        "",
        *_rows(verdict.table),
    ]
    for heading, items in (("Notes", verdict.notes), ("What was tried", verdict.tried)):
        if items:
            lines += ["", f"## {heading}", "", *(f"- {item}" for item in items)]
    lines += ["", "; ".join(f"{k} {v}" for k, v in verdict.provenance.items()), ""]
    return "\n".join(lines)


def _measured_by(verdict: Verdict) -> str:
    if "source" not in verdict.provenance:
        return f"{NOT_KNOWN}: whether it has changed since is not known."
    return f"{EARLIER}: the study, or something that it measures or imports, has changed since."


def scoreboard(verdicts: Mapping[str, Verdict], folder: str, earlier: Collection[str] = ()) -> str:
    """The table of all kept verdicts.

    Args:
        verdicts: by slug.
        folder: where the pages of the studies stand, seen from the scoreboard.
        earlier: the slugs of those that were not measured by the code that is here now, as far as is known.
    """
    every = systems()
    by_slug = {s.slug: s for s in every}
    counts = Counter(v.holds for v in verdicts.values())
    waiting = [s for s in every if s.study is not None and s.slug not in verdicts]
    without = sum(s.study is None for s in every)
    changed = ", ".join(s for s, v in verdicts.items() if s in earlier and "source" in v.provenance)
    unknown = ", ".join(s for s, v in verdicts.items() if s in earlier and "source" not in v.provenance)
    lines = [
        "# Scoreboard",
        "",
        f"Whether the published claims show at our scale. Written by `{COMMAND} --all`; do not edit. "
        "Each verdict is decided by a 95 % interval over seeds against bounds fixed beforehand; "
        "a study says what was checked, which is less than what the paper claims.",
        "",
        f"Of {len(verdicts)} studies, {counts[HOLDS]} hold, {counts[REFUTED]} do not hold, "
        f"{counts[UNDECIDED]} are not decidable at this scale. Of {len(every)} systems, {without} have no study yet. "
        f"Together they took {sum(v.seconds for v in verdicts.values()) / 60:.0f} CPU minutes.",
        "",
        *((f"{EARLIER}, which has changed since: {changed}.", "") if changed else ()),
        *((f"{NOT_KNOWN}, which may have changed since: {unknown}.", "") if unknown else ()),
        *_table(
            (
                "row",
                "system",
                "claim that was checked",
                "verdict",
                "measured (95 % interval)",
                "seeds",
                "size",
                "CPU seconds",
            ),
            [_line(by_slug[slug], v, folder) for slug, v in verdicts.items()],
        ),
    ]
    if waiting:
        lines += ["", f"Not run yet: {', '.join(s.slug for s in waiting)}."]
    return "\n".join(lines) + "\n"


def effect(check: Check) -> str:
    """The measured number and its interval.

    >>> from cenote.study import above
    >>> effect(above("difference", [0.1, 0.2], expected=0.0))
    '0.15 (-0.485 to 0.785)'
    """
    return f"{_short(check.effect)} ({_short(check.interval[0])} to {_short(check.interval[1])})"


def bounds(check: Check) -> str:
    """What was expected, in words.

    >>> from cenote.study import above
    >>> bounds(above("difference", [0.1, 0.2], expected=0.1, refuted=0.02))
    'above 0.1; refuted at or below 0.02'
    """
    (low, high), (least, most) = check.expected, check.tolerated
    if low is not None and high is not None:
        return f"between {_short(low)} and {_short(high)}"
    if low is not None:
        return f"above {_short(low)}" + ("" if least is None else f"; refuted at or below {_short(least)}")
    assert high is not None
    return f"below {_short(high)}" + ("" if most is None else f"; refuted at or above {_short(most)}")


def outcome(check: Check) -> str:
    """What became of a check, and why where it is not decided."""
    if check.holds != UNDECIDED or decided(check.interval, check.expected, check.tolerated) != UNDECIDED:
        return check.holds
    # refuted by its own expectation, were there no room left between the two
    less = decided(check.interval, check.expected, check.expected) == REFUTED
    return f"{check.holds} ({'less than expected, but not refuted' if less else 'the interval crosses the bound'})"


def _line(system: System, v: Verdict, folder: str) -> tuple[str, ...]:
    first = v.checks[0]
    link = f"[{system.slug}]({folder}/{system.slug}.md)"
    measured = f"{first.what}: {effect(first)}"
    return str(system.row), link, v.claim, v.holds, measured, str(len(v.seeds)), v.size, f"{v.seconds:.0f}"


def _rows(table: list[dict[str, Any]]) -> list[str]:
    if not table:
        return []
    columns = list(dict.fromkeys(k for row in table for k in row))
    return _table(columns, [[_cell(row.get(c, "")) for c in columns] for row in table])


def _table(headings: Any, rows: Any) -> list[str]:
    def line(cells: Any) -> str:
        return f"| {' | '.join(str(c).replace('|', chr(92) + '|') for c in cells)} |"

    return [line(headings), line("---" for _ in headings), *(line(r) for r in rows)]


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(v) for v in value)
    return _short(value) if isinstance(value, float) else str(value)


def _short(number: float) -> str:
    return f"{number:,.3f}".rstrip("0").rstrip(".") if 0.1 <= abs(number) < 10_000 else f"{number:.3g}"
