"""A page of any comparison, whatever its job: the sentence, and the arms in a table."""

from __future__ import annotations

from importlib.resources import files as package_files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cenote.compare.result import ArmResult, Comparison, PairTest
from cenote.report import formats


def render_table(comparison: Comparison[Any], title: str) -> str:
    """The page as text, with no reference to anything outside itself.

    Args:
        comparison: of any job.
        title: what was compared, and on what.

    Example:
        >>> from cenote.features import digits
        >>> comparison = cenote.jobs.probe.compare(digits(), ["mean", "max"], seeds=1, references=False)
        >>> render_table(comparison, "digits").count("<tr>")
        3
    """
    environment = Environment(loader=PackageLoader("cenote.report"), autoescape=True, undefined=StrictUndefined)
    tests = {t.first: t for t in comparison.against_baseline}
    return environment.get_template("table.html.j2").render(
        c=comparison,
        title=title,
        rows=[_row(r, tests.get(r.method), comparison) for r in comparison.results],
        style=Markup((package_files("cenote.report") / "templates" / "style.css").read_text("utf-8")),
    )


def _row(result: ArmResult, test: PairTest | None, c: Comparison[Any]) -> tuple[str, ...]:
    """Name, metric, interval, difference from the baseline, its p-value, what it costs."""
    low, high = (c.words.amount(v) for v in result.interval)
    marks = [
        *(["control"] if result.control else []),
        *(["baseline"] if result.method == c.baseline else []),
        *(["efficient"] if result.method in c.pareto else []),
    ]
    return (
        result.method,
        ", ".join(marks),
        result.summary,
        c.words.amount(result.metric),
        f"{low} to {high}",
        formats.NOTHING if test is None else c.words.difference(test.difference, test.interval),
        formats.NOTHING if test is None else formats.p_value(test.p_adjusted),
        formats.NOTHING if result.cost is None else formats.significant(result.cost),
    )
