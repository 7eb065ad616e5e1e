"""What the rooms and the package show is what the catalog lists, and nothing is imported before it is named."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import subprocess
import sys
import tomllib
import types
from collections import Counter
from pathlib import Path

import pytest

import cenote
from cenote.catalog import ROOMS, load, public
from cenote.catalog.names import read

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "cenote"
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"][0]["layers"]
GROUND = LAYERS[LAYERS.index(" | ".join(ROOMS)) + 1 :]
NAMES = [(room, name, path) for room in ROOMS for name, path in public(room).items()]


def room_of(name: str) -> types.ModuleType:
    return importlib.import_module(f"cenote.{name}")


@pytest.mark.parametrize("room", ROOMS)
def test_stub_is_up_to_date(room: str) -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "build_stubs.py"))["stub"](room)
    assert (PACKAGE / room / "__init__.pyi").read_text("utf-8") == written, "run make pages (scripts/build_stubs.py)"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_shows_its_names_and_nothing_else(room: str) -> None:
    shown = dir(room_of(room))
    assert shown == sorted(public(room))
    assert sorted(room_of(room).__all__) == shown


@pytest.mark.parametrize(("room", "name", "path"), NAMES, ids=lambda value: value)
def test_a_public_name_leads_to_where_it_is_defined(room: str, name: str, path: str) -> None:
    thing = getattr(room_of(room), name)
    assert thing is load(path)
    assert f"{thing.__module__}.{thing.__name__}" == path
    assert importlib.util.find_spec(f"cenote.{room}.{name}") is None, "a module has the same name"


def test_each_path_and_each_name_is_listed_once() -> None:
    systems, methods = read("systems.toml")["system"], read("methods.toml")
    paths = [p for s in systems for key in ("classes", "also") for p in s.get(key, ())] + methods["also"]
    paths += [m["class"] for m in methods["method"] if "." in m["class"]]
    assert [p for p, times in Counter(p.rpartition(".")[2] for p in paths).items() if times > 1] == []
    assert all(p.startswith(tuple(f"cenote.{room}." for room in ROOMS)) for p in methods["also"])


def test_bases_and_helpers_are_public() -> None:
    assert {"Pool", "Pooled", "PaddedPool", "WindowPool", "stack_layers", "read_conllu"} <= set(dir(cenote.pool))


def test_what_a_room_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'cenote\.pool' has no attribute 'SimPol'"):
        cenote.pool.SimPol  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SimPol'"):
        exec("from cenote.pool import SimPol")
    assert not hasattr(cenote.pool, "_private")
    assert not hasattr(cenote.reduce, "SimPool")


def test_the_package_shows_what_is_public_and_nothing_else() -> None:
    assert dir(cenote) == sorted(cenote.__all__)
    assert len(set(cenote.__all__)) == len(cenote.__all__)
    assert set(ROOMS) <= set(dir(cenote))
    everything: dict[str, object] = {}
    exec("from cenote import *\nfrom cenote.pool import *", everything)
    assert everything.keys() >= set(cenote.__all__) | set(public("pool"))
    with pytest.raises(AttributeError, match="module 'cenote' has no attribute 'no_such_floor'"):
        cenote.no_such_floor  # noqa: B018


LATER = """
import sys
import cenote, cenote.pool
from cenote.catalog import names
print(names.read.cache_info().currsize, *(m for m in sys.modules if m.startswith("cenote.pool.")))
cenote.pool.SimPool
print(*(m for m in sys.modules if m.startswith("cenote.pool.")))
"""


def test_nothing_is_read_or_imported_before_it_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert before == "0"
    assert "cenote.pool.attention.simpool" in after.split()
    assert not any(module.startswith("cenote.pool.graph") for module in after.split())


@pytest.mark.parametrize("floor", GROUND)
def test_the_ground_names_no_class_of_a_room(floor: str) -> None:
    dotted = re.compile(rf"cenote\.({'|'.join(ROOMS)})\.[\w.]+")
    # which says where things stand now, and builds nothing
    addresses = PACKAGE / "core" / "moved.py"
    for file in sorted({*(PACKAGE / floor).rglob("*.py")} - {addresses}):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not dotted.fullmatch(node.value), (
                    f"{file.relative_to(PACKAGE)}, line {node.lineno}: {node.value}"
                )
