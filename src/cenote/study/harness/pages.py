"""Verdicts as Markdown: one page per study, and the scoreboard over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from cenote.catalog import System, systems
from cenote.study.harness.checks import HOLDS, REFUTED, UNDECIDED, Check, bounds, decided, effect, short
from cenote.study.harness.registry import history
from cenote.study.harness.rules import UNREGISTERED, UNTRAINED, WITHOUT
from cenote.study.harness.verdict import BY_OLD_RULE, Verdict

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
        f"**Verdict: {verdict.said}.** {verdict.checks[0].what}: {effect(verdict.checks[0])}, "
        f"{len(verdict.seeds)} seeds, {verdict.seconds:.0f} CPU seconds, size {verdict.size}.",
        *(("", _measured_by(verdict)) if earlier else ()),
        "",
        f"**Knock-outs: {knock_outs(verdict)}.** **Gate: {gates(verdict)}.** **Rule: {registered(verdict.slug)}.**",
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
        *_knocked_out(verdict),
        *_gates(verdict),
        "",
        "## Numbers",
        "",
        *_rows(verdict.table),
    ]
    for heading, items in (("Notes", verdict.notes), ("What was tried", verdict.tried)):
        if items:
            lines += ["", f"## {heading}", "", *(f"- {item}" for item in items)]
    lines += _history(verdict.slug)
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
    counts = Counter(v.holds for v in verdicts.values() if v.said != BY_OLD_RULE)
    old = sum(v.said == BY_OLD_RULE for v in verdicts.values())
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
        f"{counts[UNDECIDED]} are not decidable at this scale, {counts[WITHOUT]} hold without the mechanism of the claim too "
        f"and {counts[UNTRAINED]} compare arms that were not trained, so that these are not decidable either; "
        f"{counts[UNREGISTERED]} are not registered. {old} more hold by an old rule, not yet tried with a knock-out. "
        f"Of {len(every)} systems, {without} have no study yet. "
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
                "knock-out",
                "gate",
                "rule",
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


def outcome(check: Check) -> str:
    """What became of a check, and why where it is not decided."""
    if check.holds != UNDECIDED or decided(check.interval, check.expected, check.tolerated) != UNDECIDED:
        return check.holds
    # refuted by its own expectation, were there no room left between the two
    less = decided(check.interval, check.expected, check.expected) == REFUTED
    return f"{check.holds} ({'less than expected, but not refuted' if less else 'the interval crosses the bound'})"


def knock_outs(verdict: Verdict) -> str:
    """The knock-outs' verdicts, in a few words."""
    return "; ".join(f"{k.arm}: {k.holds}" for k in verdict.knocked_out) or "none"


def gates(verdict: Verdict) -> str:
    """Whether every arm was trained, in a few words."""
    failed = ", ".join(dict.fromkeys(g.arm for g in verdict.gates if not g.passed))
    return f"not trained: {failed}" if failed else "passed" if verdict.gates else "none"


def registered(slug: str) -> str:
    """Since when a rule is what it is, in a few words."""
    entries = history(slug)
    if not entries:
        return "not registered"
    changes = len(entries) - 1
    times = "once" if changes == 1 else "twice" if changes == 2 else f"{changes} times"
    return f"of {entries[-1].date}" + (f", changed {times}" if changes else "")


def _knocked_out(verdict: Verdict) -> list[str]:
    if not verdict.knocked_out:
        return []
    rows = [
        (k.arm, c.what, effect(c), bounds(c), outcome(c)) for k in verdict.knocked_out for c in k.checks if c.in_rule
    ]
    return [
        "",
        "## Knock-outs",
        "",
        "The same checks with the mechanism of the claim taken out and all else left. Where all checks of a knock-out hold, "
        "the claim is not decidable.",
        "",
        *_table(("knock-out", "check", "measured (95 % interval)", "expected", "outcome"), rows),
    ]


def _gates(verdict: Verdict) -> list[str]:
    if not verdict.gates:
        return []
    rows = [
        (
            g.arm,
            "any level" if g.beats is None else f"{g.beats.what}: {bounds(g.beats)}",
            "" if g.beats is None else effect(g.beats),
            "nothing is trained" if g.last_fifth is None else f"{g.last_fifth:.1%}, at most {g.allowed:.0%}",
            "passed" if g.passed else "not trained",
        )
        for g in verdict.gates
    ]
    return [
        "",
        "## Gates",
        "",
        "An arm counts where it beats a trivial level and has stopped improving: the last fifth of training brings a small "
        "share of all that its loss fell.",
        "",
        *_table(("arm", "trivial level", "measured (95 % interval)", "gain of the last fifth", "outcome"), rows),
    ]


def _history(slug: str) -> list[str]:
    entries = history(slug)
    if not entries:
        return []
    lines = ["", "## History of the rule", "", f"Kept in `src/cenote/study/registered/{slug}.toml`."]
    for n, entry in enumerate(entries):
        lines += ["", f"**{entry.date}.** {entry.reason}", ""]
        lines += [f"- known then: {seen}" for seen in entry.seen]
        if not n or entry.rule != entries[n - 1].rule:
            lines.append(f"- rule: {entry.rule}")
        lines += [f"- bound: {bound}" for bound in entry.bounds if not n or bound not in entries[n - 1].bounds]
        lines += [f"- bound dropped: {b}" for b in (entries[n - 1].bounds if n else ()) if b not in entry.bounds]
        known = entries[n - 1].knocked_out if n else ()
        lines += [f"- knock-out: {arm}" for arm in entry.knocked_out if arm not in known]
        before = entries[n - 1].seeds if n else {}
        if entry.seeds and dict(entry.seeds) != dict(before):
            lines.append(f"- seeds: {', '.join(f'{size} {count}' for size, count in entry.seeds.items())}")
        for name, value in entry.settings.items() if n else ():
            old = entries[n - 1].settings.get(name)
            if old is None and "." not in name:
                lines.append(f"- {name}: {_cell(value)}, new")
            elif old not in (None, value):
                lines.append(f"- {name}: {_cell(old)} became {_cell(value)}")
    return lines


def _line(system: System, v: Verdict, folder: str) -> tuple[str, ...]:
    first = v.checks[0]
    link = f"[{system.slug}]({folder}/{system.slug}.md)"
    shown = knock_outs(v), gates(v), registered(v.slug)
    measured = f"{first.what}: {effect(first)}"
    return str(system.row), link, v.claim, v.said, *shown, measured, str(len(v.seeds)), v.size, f"{v.seconds:.0f}"


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
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(v) for v in value)
    return short(value) if isinstance(value, float) else str(value)
