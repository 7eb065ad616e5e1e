"""The generated pages of docs/methods are those of the catalog, and links between pages lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import cenote

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_method_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_method_pages.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tables_of_verdicts_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "scripts" / "build_verdict_pages.py"))
    drawn, folded = (
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))
        for name in ("false_alarms", "false_alarms_folds")
    )
    tables = ROOT / "docs" / "tables"
    answers = json.loads((tables / "known-answers.json").read_text("utf-8"))
    assert (tables / "false-alarms.md").read_text("utf-8") == pages["false_alarms"](drawn, folded)
    assert (tables / "known-answers.md").read_text("utf-8") == pages["known_answers"](answers)


def test_every_built_system_and_every_pool_has_a_page_of_its_name() -> None:
    have = {p.stem for p in (ROOT / "docs" / "methods").glob("*.md")}
    assert have >= {s.slug for s in cenote.systems() if s.status != "planned"}
    assert have >= {m.name for m in cenote.methods() if m.slug is None}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), f"{page.name} links to {target}, which does not exist"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_every_fault_of_the_tables_is_a_test() -> None:
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs" / "scale.md").read_text("utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
    }
    assert len(named) > 40
    assert named <= defined, named - defined
