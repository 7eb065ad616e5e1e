"""Add an entry to src/cenote/study/registered/SLUG.toml: the rule, bounds, sizes and seeds that a study has now.

python -m scripts.register_study SLUG --reason "what changed, and why" [--date 2026-11-30]
python -m scripts.register_study SLUG --history

The study runs at its smallest size, which shows the bounds. The result in docs/studies, where there is one, is what was seen.
Before the first entry of a study stands what git knows of its earlier rules: one entry for every kept result whose claim, rule,
bounds, seeds or constants are not those of the result before. With --history nothing else is written.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib
import subprocess
from pathlib import Path
from typing import Any

from cenote.study.harness import registry
from cenote.study.harness.checks import bounds
from cenote.study.harness.registry import Entry
from cenote.study.harness.runner import read, studies, study_of
from cenote.study.harness.verdict import Verdict, seeds_by_size

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "docs/studies"


def main() -> None:
    parser = argparse.ArgumentParser(description="Register the rule of a study as it is now.")
    parser.add_argument("slug")
    parser.add_argument("--reason", help="what changed since the last entry, and why")
    parser.add_argument("--history", action="store_true", help="only what git knows of earlier rules")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    given = parser.parse_args()
    if given.history == (given.reason is not None):
        parser.error("give --reason or --history")
    if not registry.history(given.slug):
        for entry in from_git(given.slug):
            print(registry.add(given.slug, entry, entry.date, entry.reason, entry.seen), entry.date)
    if given.history:
        return
    v = study_of(given.slug)(0, "smoke")
    module = importlib.import_module(str(studies()[given.slug].study))
    now = registry.entry_of(module, v.claim, v.rule, seeds_by_size(module), v.checks, v.knocked_out, v.gates)
    known = read(ROOT / RESULTS).get(given.slug)
    seen = () if known is None else registry.seen_in(known.said, known.checks)
    print(registry.add(given.slug, now, given.date, given.reason, seen), given.date)


def from_git(slug: str) -> list[Entry]:
    """Entries of all kept results of a study whose rule was not that of the result before."""
    entries: list[Entry] = []
    seen: tuple[str, ...] = ()
    result, source = f"{RESULTS}/{slug}.json", f"src/cenote/study/{slug.replace('-', '_')}.py"
    for line in git("log", "--reverse", "--format=%h %ad", "--date=short", "--", result).splitlines():
        commit, date = line.split()
        v = Verdict.from_json(git("show", f"{commit}:{result}"))
        laid_down = tuple(f"{c.what}: {bounds(c, repr)}" for c in v.checks if c.in_rule)
        new = Entry(
            date,
            reason=git("log", "-1", "--format=%s", commit, "--", source).strip(),
            claim=v.claim,
            rule=v.rule,
            bounds=laid_down,
            seeds={v.size: len(v.seeds)},
            settings=constants(git("show", f"{commit}:{source}")),
            seen=seen,
        )
        if not entries or entries[-1].differs_from(new):
            entries.append(new)
        seen = registry.seen_in(v.holds, v.checks)
    return entries


def constants(source: str) -> dict[str, Any]:
    """The numbers that a module's constants are, as far as they follow from each other."""
    known: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            names, value = ast.unparse(node.targets[0]), node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            names, value = ast.unparse(node.target), node.value
        else:
            continue
        try:
            exec(f"{names} = {ast.unparse(value)}", {"__builtins__": {}}, known)
        # what needs imports is no number
        except Exception:
            continue
    return registry.numbers(known)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
