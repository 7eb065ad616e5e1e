"""The page of two comparisons of probes side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cenote.core.files as files
from cenote.compare import PairTest
from cenote.jobs.probe.beside import Beside, beside
from cenote.jobs.probe.result import Comparison
from cenote.report import formats
from cenote.report.assets import environment, shell
from cenote.report.formats import NOTHING, Units


@dataclass(frozen=True)
class Line:
    """A method of either run: what it reaches in both, and the difference where they are paired."""

    method: str
    first: str
    second: str
    difference: str
    p: str


def write_beside(first: str | Path, second: str | Path, out: str | Path) -> Beside:
    """Write the page of two runs of `cenote probe`.

    Args:
        first, second: their folders.
        out: file to write.

    Returns:
        What stands in it.

    Raises:
        InputError: where a folder holds no comparison of probes, or the file cannot be written there.
    """
    out = Path(out)
    files.require_place(out, "out")
    found = beside(first, second)
    files.write_whole(out, render_beside(found))
    return found


def render_beside(found: Beside) -> str:
    """The page as text, with no reference to anything outside itself."""
    return (
        environment(Units.of(found.first))
        .get_template("beside.html.j2")
        .render(b=found, runs=[_run(c) for c in (found.first, found.second)], lines=_lines(found), **shell())
    )


def _lines(found: Beside) -> list[Line]:
    first, second = ({r.method: r for r in c.results} for c in (found.first, found.second))
    best = max if found.first.metric_name == found.second.metric_name else (lambda values: values[0])
    order = sorted(
        dict.fromkeys([*first, *second]),
        key=lambda m: -best([of[m].metric for of in (first, second) if m in of]),
    )
    lines = [
        Line(m, _amount(found.first, m, first), _amount(found.second, m, second), *_told(found, found.test_of(m)))
        for m in order
    ]
    for test in found.tests:
        if test.first != test.second:
            name = f"best of each: {test.first} and {test.second}"
            lines.insert(
                0,
                Line(
                    name,
                    _amount(found.first, test.second, first),
                    _amount(found.second, test.first, second),
                    *_told(found, test),
                ),
            )
    return lines


def _amount(c: Comparison, method: str, results: dict[str, Any]) -> str:
    if method not in results:
        return f"skipped: {c.skipped[method]}" if method in c.skipped else NOTHING
    low, high = (c.words.amount(v) for v in results[method].interval)
    return f"{c.words.amount(results[method].metric)} ({low} to {high})"


def _told(found: Beside, test: PairTest | None) -> tuple[str, str]:
    if test is None:
        return NOTHING, NOTHING
    return found.first.words.difference(test.difference, test.interval), formats.p_value(test.p_adjusted)


def _run(c: Comparison) -> list[tuple[str, str]]:
    """What a run was, in lines."""
    d = c.dataset
    low, median, high = d["tokens"]
    layers = sorted({n for r in c.results for n in r.layers})
    lines = [
        ("data", f"{d['name']}, from {d['source']}"),
        ("tested", c.tested),
        ("metric", c.metric_name),
        ("tokens per item", f"{low}" if low == high else f"{low} to {high}, median {median}"),
        ("width", f"{d['dim']}"),
        *([("layers", ", ".join(map(str, layers)))] if layers else []),
        ("best", c.winner),
        ("use", c.recommended),
        ("verdict", c.sentence),
        ("when", formats.moment(c.provenance["when"]) if c.provenance.get("when") else NOTHING),
    ]
    return [*lines, *(("caution", caution) for caution in c.cautions)]
