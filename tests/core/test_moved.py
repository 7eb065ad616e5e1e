"""Modules under the names that they once had."""

import importlib
import sys

import pytest

import cenote  # noqa: F401 - which makes the old names known


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cenote.probe", "cenote.jobs.probe"),
        ("cenote.probe.metrics", "cenote.compare.metrics"),
        ("cenote.models.sentence_transformers", "cenote.bridges.sentence_transformers"),
    ],
)
def test_an_old_name_is_the_module_itself(old: str, new: str) -> None:
    sys.modules.pop(old, None)
    there = importlib.import_module(new)
    assert importlib.import_module(old) is there
    assert there.__name__ == new
    assert there.__spec__ is not None
    assert there.__spec__.name == new


def test_a_name_that_never_was_is_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"cenote\.prob"):
        importlib.import_module("cenote.prob")
