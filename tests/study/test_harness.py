import math

import matplotlib.figure
import numpy as np
import pytest
import torch

from cenote import InputError
from cenote.study import Arms, Findings, Verdict, above, below, between, harness, study
from cenote.study.harness import HOLDS, REFUTED, UNDECIDED, decide, t_interval
from cenote.study.harness.checks import bounds
from cenote.study.harness.pages import outcome


def test_interval_is_students() -> None:
    values = [0.1, 0.4, 0.3, 0.9]
    low, high = t_interval(values)
    # 3.182446 is the 97.5 % point of Student's t with 3 degrees of freedom
    reach = 3.182446 * np.std(values, ddof=1) / 2
    assert low == pytest.approx(np.mean(values) - reach, abs=1e-6)
    assert high == pytest.approx(np.mean(values) + reach, abs=1e-6)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [low < 2.0 < high for low, high in (t_interval(rng.normal(2, 1, 5).tolist()) for _ in range(2000))]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ([0.30, 0.31, 0.29], HOLDS),
        ([0.01, 0.011, 0.009], REFUTED),
        ([-0.3, -0.31, -0.29], REFUTED),
        ([0.05, 0.051, 0.052], UNDECIDED),
        ([0.0, 0.5, -0.3], UNDECIDED),
        ([0.2, 0.2, 0.2], HOLDS),
        ([0.1, 0.1, 0.1], UNDECIDED),
        ([0.02, 0.02, 0.02], REFUTED),
    ],
)
def test_above(values: list[float], holds: str) -> None:
    check = above("difference", values, expected=0.1, refuted=0.02)
    assert check.holds == holds
    mirrored = below("difference", [-v for v in values], expected=-0.1, refuted=-0.02)
    assert mirrored.holds == holds
    assert mirrored.effect == pytest.approx(-check.effect)


@pytest.mark.parametrize(
    ("values", "holds"),
    [([0.0, 0.001, -0.001], HOLDS), ([0.5, 0.51, 0.49], REFUTED), ([-0.05, 0.05, 0.0], UNDECIDED)],
)
def test_between(values: list[float], holds: str) -> None:
    assert between("difference", values, -0.01, 0.01).holds == holds


def test_infinite_bound_cannot_refute() -> None:
    check = above("difference", [-5.0, -5.1, -4.9], expected=0.0, refuted=-math.inf)
    assert check.holds == UNDECIDED
    assert check.tolerated == (None, None)
    assert bounds(check) == "above 0"


def test_an_undecided_check_says_why() -> None:
    less = above("difference", [0.05, 0.051, 0.052], expected=0.1, refuted=0.02)
    assert outcome(less) == f"{UNDECIDED} (less than expected, but not refuted)"
    noisy = above("difference", [0.0, 0.5, -0.3], expected=0.1, refuted=0.02)
    assert outcome(noisy) == f"{UNDECIDED} (the interval crosses the bound)"
    assert outcome(above("difference", [0.3, 0.31], expected=0.0)) == HOLDS


def test_a_small_effect_among_large_noise_is_not_decidable() -> None:
    rng = np.random.default_rng(1)
    assert above("difference", rng.normal(0.01, 1.0, 5).tolist(), expected=0.0).holds == UNDECIDED


def test_claim_holds_only_where_every_check_of_the_rule_holds() -> None:
    yes, no = above("a", [1.0, 1.1], 0.0), above("b", [-1.0, -1.1], 0.0)
    unsure = above("c", [-1.0, 1.0], 0.0)
    aside = above("d", [-1.0, -1.1], 0.0, in_rule=False)
    assert decide([yes, aside]) == HOLDS
    assert decide([yes, unsure]) == UNDECIDED
    assert decide([yes, unsure, no]) == REFUTED
    with pytest.raises(InputError, match="part of the rule"):
        decide([aside])


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="at least 2 seeds, got 1"):
        above("difference", [0.3], 0.0)
    with pytest.raises(InputError, match="difference: expected finite"):
        above("difference", [0.3, math.nan], 0.0)
    with pytest.raises(InputError, match="what refutes must lie outside"):
        above("difference", [0.3, 0.4], expected=0.0, refuted=0.1)
    with pytest.raises(InputError, match="Refuted if"):
        harness.claim_and_rule("A claim alone.")


def test_arms_are_paired_seed_by_seed() -> None:
    arms = Arms(a=(1.0, 2.0, 3.0), b=(0.5, 2.5, 2.0))
    assert arms.minus("a", "b") == (0.5, -0.5, 1.0)
    row = arms.table("metric", size={"a": 7})[0]
    assert row["per seed"] == [1.0, 2.0, 3.0]
    assert row["size"] == 7
    assert row["low"] < row["mean"] == 2.0 < row["high"]


def _study(effect: float):
    """A study whose outcome is known, as if it were a module of its own."""

    def run(seed: int, size: harness.Size) -> Findings:
        torch.manual_seed(12345)
        seeds = harness.seeds_of(seed, size)
        arms = Arms(ours=tuple(effect + 0.001 * s for s in seeds), theirs=tuple(0.002 * s for s in seeds))
        return Findings(
            seeds=seeds,
            checks=(above("ours minus theirs", arms.minus("ours", "theirs"), expected=0.1, refuted=0.0),),
            table=arms.table("accuracy"),
            figure=lambda figure: harness.draw_arms(figure.subplots(), arms, "accuracy"),
            notes=("a note",),
        )

    run.__module__ = __name__
    return study(run)


__doc__ = """Ours is better by a tenth.

Refuted if ours is no better.
"""


@pytest.mark.parametrize(("effect", "holds"), [(0.5, HOLDS), (0.05, UNDECIDED), (-0.5, REFUTED)])
def test_study_decides(effect: float, holds: str) -> None:
    before = torch.get_rng_state()
    verdict = _study(effect)(3, "small")
    assert torch.equal(torch.get_rng_state(), before)
    assert verdict.holds == holds
    assert verdict.claim == "Ours is better by a tenth."
    assert verdict.rule == "Refuted if ours is no better."
    assert verdict.slug == "test-harness"
    assert verdict.seeds == (3, 4, 5, 6, 7)
    assert verdict.effect == pytest.approx(effect - 0.005)
    assert verdict.interval == verdict.checks[0].interval
    assert set(verdict.provenance) == {"cenote", "torch", "python", "source"}


def test_smoke_run_decides_nothing() -> None:
    verdict = _study(0.5)(0, "smoke")
    assert verdict.holds == UNDECIDED
    assert [c.holds for c in verdict.checks] == [UNDECIDED]
    assert verdict.notes == ("a note", harness.verdict.SMOKE_NOTE)


def test_unknown_size_is_named() -> None:
    with pytest.raises(InputError, match="size: expected 'smoke', 'small' or 'full', got 'large'"):
        _study(0.5)(0, "large")  # type: ignore[arg-type]


def test_verdict_survives_json() -> None:
    verdict = _study(0.5)(0, "small")
    back = Verdict.from_json(verdict.to_json())
    assert back.figure == "test-harness.svg"
    assert back.checks == verdict.checks
    assert back.table == verdict.table
    assert (back.holds, back.seeds, back.interval) == (verdict.holds, verdict.seeds, verdict.interval)
    assert back.to_json() == verdict.to_json()
    with pytest.raises(ValueError, match="changed after it was written"):
        Verdict.from_json(verdict.to_json().replace(f'"slug": "{verdict.slug}"', '"slug": "other"'))


def test_figure_shows_every_arm() -> None:
    verdict = _study(0.5)(0, "small")
    figure = matplotlib.figure.Figure()
    assert callable(verdict.figure)
    verdict.figure(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ours", "theirs"]
