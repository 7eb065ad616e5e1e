"""The program as a whole: what it says of itself, at once, and which files its commands are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cenote.catalog.entries import _exists
from cenote.catalog.names import places
from cenote.cli.app import app
from cenote.core.version import __version__
from tests.cli.program import Run

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "scipy", "sklearn", "pyarrow", "matplotlib", "transformers")
TELLS = f"""
import json, sys
from cenote.cli import main

sys.argv = ["cenote", *json.loads(sys.argv[1])]
try:
    main()
finally:
    sys.stderr.write(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["probe", "--help"], ["list"], ["show", "simpool"], ["--version"]]
)
def test_what_only_tells_imports_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-c", TELLS, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "120"})
    assert done.stdout
    assert json.loads(done.stderr) == []


def test_a_list_reads_files_and_finds_what_can_be_imported() -> None:
    assert [path for path in places().values() if not _exists(path)] == []
    assert not _exists("cenote.pool.attention.simpool.SimPoolX")
    assert not _exists("cenote.pool.attention.simpool.Sim")


@pytest.mark.parametrize("short", [[], ["probe"], ["models", "show"]])
def test_h_is_help(short: list[str], cenote: Run) -> None:
    code, told, _ = cenote(*short, "-h")
    assert (code, told) == (0, cenote(*short, "--help")[1])
    assert "Usage:" in told


def test_version(cenote: Run) -> None:
    assert cenote("--version") == (0, f"cenote {__version__}\n", "")


def test_the_package_is_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "cenote", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"cenote {__version__}\n"
    wrong = subprocess.run(
        [sys.executable, "-m", "cenote", "show", "none"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: SLUG: no system matches 'none'")


def test_the_contract_of_commands_names_each() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["name"] == "No command imports another")
    commands = [
        *app.registered_commands,
        *(c for group in app.registered_groups for c in group.typer_instance.registered_commands),
    ]
    assert sorted(contract["modules"]) == sorted({command.callback.__module__ for command in commands})
