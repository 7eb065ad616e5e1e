"""Write docs/tables/false-alarms.md and docs/tables/known-answers.md from what was measured.

python scripts/build_verdict_pages.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = ROOT / "docs" / "tables"
MARK = "<!-- written by scripts/build_verdict_pages.py; do not edit -->"


def false_alarms(drawn: dict[str, Any], folded: dict[str, Any]) -> str:
    """The page of the simulation: of drawn scores, of trained folds, and the power."""
    lines = [
        MARK,
        "",
        "# False alarms, coverage and power",
        "",
        "How often a comparison of equally good methods calls any two of them different (alarms, at level 0.05, "
        "after all "
        "corrections), how often 95 % intervals hold the truth, and how often a gain of five points is found. "
        "Scores are drawn, "
        "not trained, but for those of folds; each run goes through `cenote.compare.judge`, as results of `cenote "
        "probe` do. "
        "Bounds: alarms at most 0.07, coverage at least 0.93; intervals wider than 0.97 are named *wider*. A case "
        "that missed a "
        "bound was drawn again, five times as often from another seed; what it gave at first stands beside it. "
        "Written by",
        "",
        "```bash",
        "python -m benchmarks.false_alarms --without folds --json benchmarks/results/false_alarms.json",
        "python -m benchmarks.false_alarms --only folds: --json benchmarks/results/false_alarms_folds.json",
        "python scripts/build_verdict_pages.py",
        "```",
        "",
    ]
    for title, found in (("One split", drawn), ("Folds", folded)):
        rows = found["levels"]
        missed = [r["case"] for r in rows if r["verdict"] == "missed"]
        lines += [
            f"## {title}",
            "",
            f"{len(rows)} cases, {found['runs']} runs each: alarms from {_least(rows, 'alarms')} to {_most(rows, 'alarms')}, "
            f"coverage from {_least(rows, 'coverage')} to {_most(rows, 'coverage')}, of differences from "
            f"{_least(rows, 'coverage of differences')} to {_most(rows, 'coverage of differences')}. "
            + (f"Out of bounds: {'; '.join(missed)}." if missed else "All within the bounds."),
            "",
            "| case | alarms | coverage | of differences | no verdict | |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_level(row) for row in rows]
        lines.append("")
    if drawn["powers"]:
        lines += [
            "## Power",
            "",
            "Of a planted gain of five points over the baseline, beside the paired percentile bootstrap over "
            "groups, which decided "
            "before. Where the bootstrap raises more than 0.07 alarms, its power counts for nothing.",
            "",
            "| case | power | of the bootstrap | alarms of the bootstrap | |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['case']} | {r['power']:.3f} | {r['power of the bootstrap']:.3f} | {r['alarms of the bootstrap']:.3f} | "
            f"{r['verdict']} |"
            for r in drawn["powers"]
        ]
        lines.append("")
    return "\n".join(lines)


def known_answers(found: dict[str, Any]) -> str:
    """The page of four kinds of data on which a verdict once was wrong."""
    lines = [
        MARK,
        "",
        "# Data whose answer is known",
        "",
        "Four kinds of data on which a verdict of this program once was wrong, through `cenote.jobs.probe.compare` "
        "with the recipe "
        "as it is. Written by",
        "",
        "```bash",
        "python -m benchmarks.known_answers",
        "python scripts/build_verdict_pages.py",
        "```",
        "",
        "## Targets far from zero",
        "",
        "200 items; the mean of the tokens decides. `ridge` is ridge regression on the same means. An "
        "untransformed target gave "
        "the linear probe on the mean an R2 of -12.07 on the first and -1311 on the second.",
        "",
    ]
    lines += _values("targets", found["targets far from zero"])
    lines += [
        "## Noise in groups",
        "",
        "200 items without any signal, four poolings: every winner is a false alarm. The percentile bootstrap over "
        "groups called one "
        "in 20 of 20 runs with 5 or 6 groups, 13 of 20 with 10, 9 of 40 with 15.",
        "",
        "| groups | runs | winners called | said that no verdict can be given |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['groups'] or 'none'} | {r['runs']} | {r['alarms']} | {r['no verdict']} |"
        for r in found["noise in groups"]
    ]
    (split,) = found["one split"]
    lines += [
        "",
        "## One split",
        "",
        f"The first 200 of the embedded digits in {split['splits']} other splits, with one split each.",
        "",
        "| pooling | lowest accuracy | highest | came first |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {m} | {min(v):.3f} | {max(v):.3f} | {split['winners'].count(m)} times |" for m, v in split["values"].items()
    ]
    lines += [
        "",
        f"In folds, which are the default for so few items, the program says: *{split['folds']['sentence']}*",
        "",
        "## Copies in disguise",
        "",
        "25 patients of one label each give 200 items; nothing but the patient can be known. Without `--group`:",
        "",
    ]
    without, with_group = found["copies in disguise"]
    lines += _values("group", [without, with_group])
    lines += [
        f"Without a group it warns: *{next(c for c in without['cautions'] if 'patient' in c)}*. With `--group patient`: "
        f"*{with_group['sentence']}*",
        "",
    ]
    return "\n".join(lines)


def _values(key: str, rows: list[dict[str, Any]]) -> list[str]:
    methods = sorted(rows[0]["values"])
    head = [f"| {key} | {' | '.join(methods)} |", "| --- |" + " --- |" * len(methods)]
    body = [f"| {r[key] or 'none'} | {' | '.join(format(r['values'][m], '.3f') for m in methods)} |" for r in rows]
    return [*head, *body, ""]


def _level(row: dict[str, Any]) -> str:
    first = row.get("at first")
    told = row["verdict"]
    if first:
        told += (
            f"; at first alarms {first['alarms']:.3f}, coverage {first['coverage']:.3f} and "
            f"{first['coverage of differences']:.3f}"
        )
    numbers = " | ".join(f"{row[k]:.3f}" for k in ("alarms", "coverage", "coverage of differences"))
    return f"| {row['case']} | {numbers} | {row['no verdict']:.2f} | {told} |"


def _least(rows: list[dict[str, Any]], key: str) -> str:
    return f"{min(r[key] for r in rows):.3f}"


def _most(rows: list[dict[str, Any]], key: str) -> str:
    return f"{max(r[key] for r in rows):.3f}"


def main() -> None:
    drawn, folded = (json.loads((RESULTS / f"{n}.json").read_text()) for n in ("false_alarms", "false_alarms_folds"))
    (TABLES / "false-alarms.md").write_text(false_alarms(drawn, folded), "utf-8")
    answers = json.loads((TABLES / "known-answers.json").read_text("utf-8"))
    (TABLES / "known-answers.md").write_text(known_answers(answers), "utf-8")


if __name__ == "__main__":
    main()
