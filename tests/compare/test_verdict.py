from __future__ import annotations

import dataclasses

import pytest

from cenote.compare.result import ArmResult, Comparison, PairTest
from cenote.compare.verdict import reason, sentence


def compared(interval: tuple[float, float]) -> Comparison[ArmResult]:
    """Two arms, 5.5 points apart, and a test that is sure of it."""
    arms = [
        ArmResult(method=name, summary="", metric=metric, interval=(0, 1), metric_per_seed=(metric,), seconds=1.0)
        for name, metric in (("max", 1.0), ("mean", 0.945))
    ]
    test = PairTest(first="max", second="mean", difference=0.055, interval=interval, p_value=0.03, p_adjusted=0.03)
    back = PairTest(first="mean", second="max", difference=-0.055, interval=interval, p_value=0.03, p_adjusted=0.03)
    return Comparison(
        metric_name="AUROC",
        results=tuple(arms),
        skipped={},
        baseline="mean",
        winner="max",
        against_baseline=(test,),
        against_winner=(back,),
        pairs=(test,),
        pareto=(),
        sentence="",
        recommended="max",
    )


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.01, 0.1), ""),
        ((-0.018, 0.128), " by its test alone (p = 0.03), while the interval holds 0: take it for a hint"),
        ((0.0, 0.128), " by its test alone (p = 0.03), while the interval holds 0: take it for a hint"),
    ],
)
def test_a_test_that_is_at_odds_with_its_interval_is_a_hint(interval: tuple[float, float], said: str) -> None:
    text = sentence(compared(interval))
    assert text.startswith("max beats mean by ")
    assert ("take it for a hint" in text) == bool(said)
    assert said in text


def test_without_a_verdict_nothing_can_be_told_apart() -> None:
    found = compared((0.01, 0.1))
    assert reason(found) == "it comes first, and all others can be told from it"
    none = dataclasses.replace(found, no_verdict="1 test unit cannot carry one")
    assert reason(none) == "it comes first; these data cannot tell more"
