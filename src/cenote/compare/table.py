"""A comparison as a table that other tools read: rows, CSV, LaTeX, HTML."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from cenote.core.json_text import json_text
from cenote.core.requirements import require_one_of, require_several


@runtime_checkable
class Judged(Protocol):
    """What is read of a `cenote.compare.result.Comparison`."""

    @property
    def results(self) -> Sequence[Any]: ...
    @property
    def against_baseline(self) -> Sequence[Any]: ...
    @property
    def metric_name(self) -> str: ...
    @property
    def baseline(self) -> str: ...
    @property
    def winner(self) -> str: ...
    @property
    def recommended(self) -> str: ...
    @property
    def pareto(self) -> Sequence[str]: ...
    @property
    def sentence(self) -> str: ...


SHOWN = ("method", "metric", "low", "high", "difference", "p_adjusted", "cost")
"""Of the columns, those for people."""
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
)


def rows(comparison: Judged) -> list[dict[str, Any]]:
    """One row an arm, best first: what was measured of it, and how it compares with the baseline.

    `low` and `high` are the 95 % interval of the metric, `difference`, `difference_low`, `difference_high`, `p_value` and
    `p_adjusted` the paired test against the baseline, None for the baseline itself. What a field holds several numbers in
    (per seed, per epoch) is left out; `Comparison.to_json` has all.
    """
    tests = {t.first if t.second == comparison.baseline else t.second: t for t in comparison.against_baseline}
    found = []
    for rank, result in enumerate(comparison.results, 1):
        plain = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
        low, high = plain.pop("interval")
        test = tests.get(result.method)
        seen = None if test is None else test.seen_from(result.method)
        found.append({
            "rank": rank,
            "method": plain.pop("method"),
            "metric": plain.pop("metric"),
            "low": low,
            "high": high,
            "difference": None if seen is None else seen.difference,
            "difference_low": None if seen is None else seen.interval[0],
            "difference_high": None if seen is None else seen.interval[1],
            "p_value": None if seen is None else seen.p_value,
            "p_adjusted": None if seen is None else seen.p_adjusted,
            "cost": result.cost,
            "winner": result.method == comparison.winner,
            "recommended": result.method == comparison.recommended,
            "pareto": result.method in comparison.pareto,
            **{name: value for name, value in plain.items() if isinstance(value, str | int | float | None)},
        })  # fmt: skip
    return found


def to_csv(comparison: Judged) -> str:
    """The rows as CSV with a header line."""
    text = io.StringIO(newline="")
    table = rows(comparison)
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def to_jsonl(comparison: Judged) -> str:
    """The rows as JSON lines: an object an arm, each with what all were compared by."""
    of_all = {"metric_name": comparison.metric_name, "baseline": comparison.baseline}
    return "".join(json_text({**row, **of_all}) + "\n" for row in rows(comparison))


def to_latex(comparison: Judged, columns: Sequence[str] | None = None) -> str:
    """The rows as a `tabular` with the rules of booktabs; the winner in bold.

    Args:
        comparison: of any job.
        columns: of `rows`; default: those that are known of any arm among method, metric, interval, difference, p and cost.
    """
    table = rows(comparison)
    names = _chosen(table, columns)
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
        "\\toprule",
        " & ".join(_title(name, comparison).translate(LATEX) for name in names) + r" \\",
        "\\midrule",
    ]
    for row in table:
        cells = [_cell(row[name]).translate(LATEX) for name in names]
        if row["winner"]:
            cells = [f"\\textbf{{{cell}}}" for cell in cells]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def to_html(comparison: Judged) -> str:
    """The verdict and the rows, for a notebook."""
    table = rows(comparison)
    names = _chosen(table, None)
    head = "".join(f"<th>{html.escape(_title(name, comparison))}</th>" for name in names)
    body = "".join(f"<tr>{''.join(_tagged(row, name) for name in names)}</tr>" for row in table)
    return (
        f"<p>{html.escape(comparison.sentence)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _chosen(table: list[dict[str, Any]], columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return [name for name in SHOWN if any(row[name] is not None for row in table)]
    require_several(columns=columns)
    for name in columns:
        require_one_of(table[0], columns=name)
    return list(columns)


def _title(name: str, comparison: Judged) -> str:
    return {
        "metric": comparison.metric_name,
        "difference": f"minus {comparison.baseline}",
        "p_adjusted": "adjusted p",
    }.get(name, name.replace("_", " "))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _tagged(row: dict[str, Any], name: str) -> str:
    text = html.escape(_cell(row[name]))
    return f"<td><strong>{text}</strong></td>" if row["winner"] else f"<td>{text}</td>"
