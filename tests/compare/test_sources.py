"""Which code a result follows from."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cenote.compare import sources
from cenote.compare.sources import source_digest

FILES = {
    "__init__.py": "from {name}.method import Method\nfrom {name}.other import Other\n",
    "method.py": "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom . import helped\n"
    "from {name}.parts import half\nif TYPE_CHECKING:\n    from {name}.only_types import T\n\n\nclass Method:\n"
    "    def run(self):\n        import {name}.late\n        return half\n",
    "helped.py": "A = 1\n",
    "late.py": "B = 1\n",
    "other.py": "class Other: pass\n",
    "only_types.py": "T = int\n",
    "parts/__init__.py": "from {name}.parts.halves import half\nfrom {name}.parts.thirds import third\n",
    "parts/halves.py": "half = 2\n",
    "parts/thirds.py": "third = 3\n",
}

Make = Callable[[dict[str, str]], ModuleType]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Write a package with some files changed, and import it under the name that it always has."""
    name = "a_package_of_mine"

    def make(changed: dict[str, str]) -> ModuleType:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        for file, text in (FILES | changed).items():
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("{name}", name))
        for known in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[known]
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module(name)

    yield make
    for known in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[known]


def test_a_copy_has_the_same_digest(package: Make) -> None:
    assert source_digest(package({}).Method) == source_digest(package({}).Method)


@pytest.mark.parametrize("file", ["method.py", "helped.py", "late.py", "parts/halves.py"])
def test_what_the_method_imports_changes_it(file: str, package: Make) -> None:
    before = source_digest(package({}).Method)
    assert source_digest(package({file: FILES[file] + "# a word\n"}).Method) != before


@pytest.mark.parametrize("file", ["other.py", "only_types.py", "parts/thirds.py", "parts/__init__.py", "__init__.py"])
def test_what_it_does_not_run_leaves_it(file: str, package: Make) -> None:
    before = source_digest(package({}).Method)
    assert source_digest(package({file: FILES[file] + "# a word\n"}).Method) == before


def test_a_name_that_a_package_finds_later_is_followed_through_its_stub(package: Make) -> None:
    lazy = {
        "method.py": "from {name}.parts import half\n\n\nclass Method: pass\n",
        "parts/__init__.py": "def __getattr__(name):\n    from importlib import import_module\n"
        "    return getattr(import_module('{name}.parts.halves'), name)\n",
        "parts/__init__.pyi": "from {name}.parts.halves import half as half\n",
    }
    before = source_digest(package(lazy).Method)
    assert source_digest(package(lazy | {"parts/halves.py": "half = 3\n"}).Method) != before
    assert source_digest(package(lazy | {"parts/thirds.py": "third = 4\n"}).Method) == before


def test_a_name_that_a_package_finds_later_is_followed_through_what_it_says_for_types(package: Make) -> None:
    lazy = {
        "method.py": "from {name}.parts import half\n\n\nclass Method: pass\n",
        "parts/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {name}.parts.halves import half\n"
        "    from {name}.parts.thirds import third\n\n\ndef __getattr__(name):\n    from importlib import import_module\n"
        "    return getattr(import_module('{name}.parts.halves'), name)\n",
    }
    before = source_digest(package(lazy).Method)
    assert source_digest(package(lazy | {"parts/halves.py": "half = 3\n"}).Method) != before
    assert source_digest(package(lazy | {"parts/thirds.py": "third = 4\n"}).Method) == before


def test_reading_imports_runs_nothing(package: Make) -> None:
    made = package({"late.py": "raise RuntimeError('was run')\n"})
    source_digest(made.Method)
    assert "a_package_of_mine.late" not in sys.modules


def test_a_file_beside_a_script_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for n, text in enumerate(["X = 1\n", "X = 2\n"]):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "my_script.py").write_text("import my_helpers\nclass Mine: pass\n")
        (folder / "my_helpers.py").write_text(text)
        script = ModuleType("__main__")
        script.__file__ = str(folder / "my_script.py")
        digests.append(source_digest(script))
    assert digests[0] != digests[1]


def test_what_is_in_no_file_is_never_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_notebook", ModuleType("a_notebook"))
    typed = type("Typed", (), {"__module__": "a_notebook"})
    assert source_digest(typed) != source_digest(typed)


def test_versions_of_other_peoples_libraries_count(package: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = package({"helped.py": "import scipy\n"})
    before = source_digest(made.Method)
    known = sources._version
    monkeypatch.setattr(sources, "_version", lambda top: "0.0" if top == "scipy" else known(top))
    assert source_digest(made.Method) != before


def test_the_hardware_of_a_build_does_not_count(package: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = package({"helped.py": "import scipy\n"})
    found = set()
    for build in ("2.13.0", "2.13.0+cpu", "2.13.0+cu126"):
        monkeypatch.setattr(sources, "version", lambda _, build=build: build)
        sources._version.cache_clear()
        found.add(source_digest(made.Method))
    sources._version.cache_clear()
    assert len(found) == 1


def test_pools_do_not_follow_from_each_other() -> None:
    from cenote.pool import GeM, SimPool

    assert source_digest(SimPool) != source_digest(GeM)
