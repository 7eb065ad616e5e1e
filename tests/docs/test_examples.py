"""What the documentation shows runs: Python blocks are executed, `cenote` commands are parsed."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from cenote.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
WRITTEN_ELSEWHERE = ("methods", "studies")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name not in WRITTEN_ELSEWHERE),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # a module that can be found by its name, because torch.compile looks there for what a class refers to
    module = types.ModuleType("documentation_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for i, block in enumerate(blocks(page, "python")):
        # an example fails by raising, which the assertions that stand in it do too
        exec(compile(block, f"{name(page)}, example {i + 1}", "exec"), module.__dict__)


COMMANDS = [
    pytest.param(line.split("#")[0].strip(), id=f"{name(page)}: {line}")
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.splitlines()
    if line.startswith(("cenote ", "make "))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist_with_their_options(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert {w for w in words if "=" not in w} <= set(targets)
        return
    commands: dict[str, Any] = typer.main.get_command(app).commands
    command = commands[words[0]]
    # parses without running: unknown options and missing arguments raise
    command.make_context(words[0], list(words[1:]), resilient_parsing=False).close()


def test_there_are_examples_to_check() -> None:
    assert len(COMMANDS) >= 5
    assert sum(len(blocks(p, "python")) for p in PAGES) >= 6
