"""What the catalog says of a system's parts can be looked up."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

import cenote
from cenote.catalog import Part, System, parts
from cenote.core import InputError

ROOT = Path(__file__).resolve().parents[2]
WITH_PARTS = [s for s in cenote.systems() if s.parts]
PROOF_OF_STUDY = ("study", "knockout")


@cache
def source(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


@cache
def study_source(slug: str) -> str:
    place = ROOT / "src" / "cenote" / "study" / slug.replace("-", "_")
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return "\n".join(f.read_text("utf-8") for f in files)


def stands(where: str, slug: str) -> bool:
    """Whether what meets a part is there."""
    if where.startswith("tests/"):
        file, _, name = where.partition("::")
        return (ROOT / file).is_file() and bool(re.search(rf"^\s*def {re.escape(name)}\(", source(file), re.M))
    if where.startswith("docs/"):
        return (ROOT / where).is_file()
    if where.startswith("study: "):
        return where.removeprefix("study: ") in study_source(slug)
    if where.startswith("golden: "):
        adapter = ROOT / "tests" / "golden" / "adapters" / f"{slug.replace('-', '_')}.py"
        return adapter.is_file()
    return imports(where)


def imports(path: str) -> bool:
    """Whether a dotted path leads to a module, a name of it, or an attribute of that."""
    words = path.split(".")
    for cut in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:cut]))
        except ImportError:
            continue
        for word in words[cut:]:
            if not hasattr(found, word):
                return False
            found = getattr(found, word)
        return True
    return False


@pytest.mark.parametrize("system", WITH_PARTS, ids=lambda s: s.slug)
def test_what_meets_a_part_is_there(system: System) -> None:
    lost = [f"{p.name}: {w}" for p in system.parts for w in p.met_by if not stands(w, system.slug)]
    assert not lost


@pytest.mark.parametrize("system", WITH_PARTS, ids=lambda s: s.slug)
def test_arms_of_studies_are_met_by_the_study(system: System) -> None:
    for p in system.parts:
        if p.kind in PROOF_OF_STUDY and p.state == "present":
            assert any(w.startswith("study: ") for w in p.met_by), f"{p.name}: name the arm, study: ARM"
        if p.kind == "edge" and p.state == "present":
            assert any(w.startswith("tests/") for w in p.met_by), f"{p.name}: name the test that holds it"


def test_every_built_system_says_what_it_consists_of() -> None:
    assert [s.slug for s in cenote.systems() if s.classes and not s.parts] == []


def test_a_part_is_met_or_missing_or_answered() -> None:
    with pytest.raises(InputError, match="part 'x' is met, or missing, or answered"):
        Part("x", "method", "it")
    with pytest.raises(InputError, match="part 'x'"):
        Part("x", "method", "it", missing="a", answered="b")
    assert Part("x", "method", "it", ("cenote.pool",), missing="the other half").state == "missing"
    assert parts("no-such-system") == ()


def test_what_is_not_there_is_found_out() -> None:
    assert imports("cenote.pool.attention.simpool.SimPool.forward")
    assert not imports("cenote.pool.attention.simpool.NoPool")
    assert not stands("tests/catalog/test_parts.py::test_nothing", "simpool")
    assert not stands("study: an arm that nobody measured", "simpool")
