"""Every explainer of the catalog has a name, says what it reads, and says whether it draws."""

from __future__ import annotations

import inspect

import pytest

import cenote
from cenote.catalog import load, public
from cenote.explain.base import Explainer
from cenote.jobs.explain.verdict import ASKING, ATTENTION

EXPLAINERS = {
    name: kind
    for name, path in public("explain").items()
    if isinstance(kind := load(path), type) and issubclass(kind, Explainer) and not inspect.isabstract(kind)
}


def test_there_are_some() -> None:
    assert {"AttentionRollout", "GlobEnc", "ExtremalPerturbation", "CometExplainer", "InputGradients"} <= set(
        EXPLAINERS
    )


@pytest.mark.parametrize("name", EXPLAINERS)
def test_an_explainer_has_a_name_to_be_built_by(name: str) -> None:
    kind = EXPLAINERS[name]
    assert any(m.load() is kind for m in cenote.methods(room="explain"))


@pytest.mark.parametrize("method", cenote.methods(room="explain"), ids=lambda m: m.name)
def test_an_explainer_says_what_it_reads_and_whether_it_draws(method: cenote.catalog.Method) -> None:
    if method.path == "cenote.explain.captum.Captum":
        pytest.importorskip("captum", reason="cenote[explain] is not installed")
    made = cenote.create(method.name)
    assert made.family in (ATTENTION, *ASKING)
    if made.draws:
        first, other = (cenote.create(method.name, random_state=seed) for seed in (0, 1))
        assert first.random_state != other.random_state
    elif method.path != "cenote.explain.captum.Captum":
        assert "random_state" not in inspect.signature(method.load()).parameters
