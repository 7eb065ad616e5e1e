import numpy as np
import pytest
from scipy import stats

from cenote.compare.agreement import agreement, system_agreement, system_interval
from cenote.core import InputError

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=40)
GUESS = TRUTH + RNG.normal(size=40)
SYSTEM = np.array(["a", "b", "c", "d", "e", "f", "g", "h"] * 5)


def test_agreement_is_that_of_scipy() -> None:
    found = agreement(GUESS, TRUTH)
    assert found.rank == pytest.approx(stats.spearmanr(GUESS, TRUTH)[0])
    assert found.linear == pytest.approx(stats.pearsonr(GUESS, TRUTH)[0])
    assert found.kendall == pytest.approx(stats.kendalltau(GUESS, TRUTH)[0])
    assert found.squared_error == pytest.approx(((GUESS - TRUTH) ** 2).mean())
    assert np.isnan(agreement(np.ones(4), TRUTH[:4])[:3]).all()


def test_systems_are_compared_by_their_means() -> None:
    means = [np.array([v[s == SYSTEM].mean() for s in "abcdefgh"]) for v in (GUESS, TRUTH)]
    assert system_agreement(GUESS, TRUTH, SYSTEM) == pytest.approx(agreement(*means))
    # noise within a system cancels in its mean: the systems agree where their clips do not
    noise = RNG.permutation(np.repeat([1.0, -1.0], 4))
    truth, guess = np.repeat([1.0, 2.0, 3.0], 8), np.repeat([1.0, 2.0, 3.0], 8) + 9 * np.tile(noise, 3)
    assert system_agreement(guess, truth, truth).rank == pytest.approx(1)
    assert agreement(guess, truth).rank < 0.5


def test_the_interval_is_of_systems_and_holds_their_correlation() -> None:
    low, high = system_interval(GUESS, TRUTH, SYSTEM, resamples=200)
    assert low < system_agreement(GUESS, TRUTH, SYSTEM).rank < high
    assert (low, high) == system_interval(GUESS, TRUTH, SYSTEM, resamples=200)
    # more clips of the same systems do not narrow it
    again = [np.tile(v, 3) for v in (GUESS, TRUTH, SYSTEM)]
    assert system_interval(*again, resamples=200) == pytest.approx((low, high))


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="guess"):
        agreement(GUESS[:3], TRUTH[:2])
    with pytest.raises(InputError, match="system: expected one per item"):
        system_agreement(GUESS, TRUTH, SYSTEM[:3])
    with pytest.raises(InputError, match="system: 1 systems"):
        system_interval(GUESS, TRUTH, np.zeros(40))
