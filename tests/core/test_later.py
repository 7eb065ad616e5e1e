"""What waits until it is needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import cenote.core
from cenote.core.later import after_import


def test_all_that_the_ground_floor_shows_is_found() -> None:
    for name in cenote.core.__all__:
        assert getattr(cenote.core, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'cenote.core' has no attribute 'Bag'"):
        cenote.core.Bag  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Bag'"):
        from cenote.core import Bag  # noqa: F401


def test_something_is_done_once_right_behind_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, done = "a_module_that_waits", []
    (tmp_path / f"{name}.py").write_text("raise ZeroDivisionError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    after_import(name, lambda: done.append(vars(sys.modules[name]).get("LAST")))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(name)
    assert not done
    (tmp_path / f"{name}.py").write_text("LAST = 'has run, and this file is longer'\n")
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    assert done == ["has run, and this file is longer"]
    assert list(sys.meta_path) == finders
    del sys.modules[name]
    assert importlib.import_module(name) is not module
    assert len(done) == 1
    del sys.modules[name]


def test_exponentials_are_settled_when_torch_is_imported() -> None:
    told = """
import sys, cenote, cenote.core.vector_math
assert "torch" not in sys.modules
(waiting,) = (f for f in sys.meta_path if type(f).__name__ == "_After")
assert waiting.act is cenote.core.vector_math.settle
waiting.act = lambda: print("torch" in sys.modules, sys.modules["torch"].zeros(1).exp().item())
import torch
print(waiting in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True 1.0", "False"]
