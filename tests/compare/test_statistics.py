import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from cenote.compare import metrics, statistics
from cenote.compare.inference import Inference, Measure
from cenote.compare.intervals import Spread, interval
from cenote.compare.metrics import SHARES, auroc, auroc_pair_shares, ranked
from cenote.compare.pareto import pareto
from cenote.compare.units import Units
from cenote.core import InputError


def test_holm_agrees_with_statsmodels() -> None:
    p = np.random.default_rng(0).uniform(size=12) ** 3
    assert statistics.holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist())


def test_sign_flips_are_counted_out_as_scipy_does() -> None:
    d = np.random.default_rng(0).normal(0.4, 1, size=(10, 3))
    theirs = scipy.stats.permutation_test((d[:, 0],), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert statistics.sign_flip_p(d)[0] == pytest.approx(theirs.pvalue)
    drawn = statistics.sign_flip_p(d, flips=400)
    assert drawn == pytest.approx(statistics.sign_flip_p(d), abs=0.06)
    assert (drawn != statistics.sign_flip_p(d)).any()


@pytest.mark.parametrize("groups", [1, 2, 5, 6, 9])
def test_few_groups_have_a_floor_that_no_difference_goes_below(groups: int) -> None:
    assert statistics.sign_flip_p(np.full((groups, 1), 1e9))[0] == pytest.approx(2.0 ** (1 - groups))
    assert (2.0 ** (1 - groups) <= 0.05) == (groups >= statistics.least_groups(1))


def test_what_is_not_known_is_not_significant() -> None:
    shares = np.array([[0.0, np.nan], [0.0, 1.0]])
    assert statistics.sign_flip_p(shares).tolist() == [1.0, 1.0]
    assert statistics.exchange_p(lambda kept: np.full(len(kept), np.nan), 9, 99) == 1.0


@pytest.mark.parametrize("tied", [False, True])
def test_the_shares_of_a_difference_of_aurocs_tell_every_exchange_of_two_arms(tied: bool) -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(40) < 0.3).astype(int)
    a, b = (y[:, None] + rng.normal(size=(40, 1)) for _ in range(2))
    a, b = (ranked(np.round(s, 1) if tied else s) for s in (a, b))
    shares, ones = auroc_pair_shares(a, b, y), np.ones((1, 40))
    for kept in (np.ones(40, bool), *(rng.random((20, 40)) < 0.5)):
        first, second = np.where(kept[:, None], a, b), np.where(kept[:, None], b, a)
        exchanged = float(auroc(first, y, ones)[0] - auroc(second, y, ones)[0])
        assert float(np.where(kept, shares, -shares).sum()) == pytest.approx(exchanged, abs=1e-12)


def test_exchanges_by_brute_force_agree_with_shares() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(30) < 0.4).astype(int)
    scores = [(2.0 * i * y[:, None] + rng.normal(size=(30, 1)))[None] for i in range(3)]
    units = Units([str(i) for i in range(30)], [str(i % 12) for i in range(30)])
    known = Measure.known("AUROC", y)
    slow = dataclasses.replace(known, pair_shares=None)
    pairs = [(0, 1), (0, 2), (1, 2)]
    quick = [p for *_, p in Inference(known, scores, units).differences(pairs)]
    assert [p for *_, p in Inference(slow, scores, units).differences(pairs)] == pytest.approx(quick, abs=0.04)
    assert min(quick) < 0.005 < 0.01 < max(quick)


def test_beyond_all_exchanges_a_bound_decides_that_few_groups_limit() -> None:
    def difference(groups: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda kept: (2 * kept - 1).sum(1) / groups

    assert statistics.exchange_p(difference(100), 100, 199) < 1e-10
    assert statistics.exchange_p(difference(5), 5, 199) >= 2 / 2**5


@pytest.mark.parametrize("name", ["accuracy", "AUROC", "R2"])
def test_few_groups_raise_no_more_false_alarms_than_promised(name: str) -> None:
    rng, alarms = np.random.default_rng(0), 0
    groups = np.repeat(np.arange(8), 10)
    units = Units([str(i) for i in range(80)], [str(g) for g in groups])
    for _ in range(200):
        y = rng.normal(size=(80, 1)) if name == "R2" else (rng.random(80) < 0.5).astype(int)
        hard = y.reshape(80, 1) + rng.normal(size=(80, 1))
        scores = [(hard - 0.5 + rng.normal(size=(80, 1)) + rng.normal(size=8)[groups, None])[None] for _ in range(2)]
        alarms += Inference(Measure.known(name, y), scores, units).differences([(0, 1)])[0][2] <= 0.05
    assert alarms / 200 <= 0.08


def test_intervals_of_shares_are_wilsons_and_keep_a_width_at_the_end() -> None:
    right = np.r_[np.ones(17), np.zeros(3)]
    spread = Spread.of(np.array([(17 - r) / 19 for r in right]), 20)
    low, high = interval(0.85, Spread(spread.variance * 19 / 20, 1e9), (0.0, 1.0), 20)
    assert (low, high) == pytest.approx(proportion_confint(17, 20, method="wilson"), abs=1e-6)
    low, high = interval(1.0, Spread.of(np.ones(20), 20), (0.0, 1.0), 20)
    assert 0.7 < low < 0.9
    assert high == pytest.approx(1.0)


def test_intervals_stay_within_limits_and_turn_with_the_scale() -> None:
    low, high = interval(0.9, Spread(0.04, 5.0), (None, 1.0))
    assert low < 0.0
    assert 0.9 < high < 1.0
    assert interval(0.9, Spread(0.04, 5.0))[1] > 1.0
    low, high = interval(4.5, Spread(0.04 * 25, 5.0), (0.0, 5.0), 9)
    assert (low / 5, high / 5) == pytest.approx(interval(0.9, Spread(0.04, 5.0), (0.0, 1.0), 9))


def test_one_group_has_no_interval() -> None:
    units = Units(["a", "b"], ["g", "g"])
    inferred = Inference(Measure("score"), [np.array([[0.1, 0.2]]), np.array([[0.3, 0.4]])], units)
    assert np.isnan(inferred.interval(0)).all()
    difference, between, p = inferred.differences([(1, 0)])[0]
    assert difference == pytest.approx(0.2)
    assert np.isnan(between).all()
    assert p == 1.0


def test_carriers_count_groups_of_the_rarest_class() -> None:
    y, rng = (np.arange(100) < 3).astype(int), np.random.default_rng(0)
    scores = [(y + rng.normal(size=100))[None, :, None] for _ in range(2)]
    inferred = Inference(Measure.known("AUROC", y), scores, Units([str(i) for i in range(100)]))
    (_, (low, high), _) = inferred.differences([(0, 1)])[0]
    assert high - low > 1.0, "three positives cannot place a difference"


def test_other_seeds_widen_what_is_said_of_methods() -> None:
    rng = np.random.default_rng(0)
    scores = [i + rng.normal(size=60) + np.array([[-2.0], [0.0], [2.0]]) * i for i in (0, 1)]
    units, pairs = Units([str(i) for i in range(60)]), [(1, 0)]
    fixed = Inference(Measure("score"), scores, units).differences(pairs)[0]
    random = Inference(Measure("score"), scores, units, seed_effects="random").differences(pairs)[0]
    assert fixed[0] == random[0]
    assert fixed[2] < 0.01 < 0.05 < random[2]
    assert random[1][0] < 0 < fixed[1][0]
    with pytest.raises(InputError, match="seed_effects: random needs at least 2 seeds"):
        Inference(Measure("score"), [s[:1] for s in scores], units, seed_effects="random")


def test_more_groups_than_are_needed_are_thrown_together() -> None:
    groups = statistics.merged(np.arange(2500), 1000)
    assert np.bincount(groups).tolist() == [3] * 500 + [2] * 500
    assert statistics.merged(np.arange(9), 1000).tolist() == list(range(9))


def test_signed_ranks_agree_with_darwins_maize() -> None:
    # eighths of an inch by which crossed plants outgrew self-fertilised ones; Wilcoxon's sum of the negative ranks is 24
    d = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48.0])
    assert statistics.signed_rank_p(d / 8) == pytest.approx(scipy.stats.wilcoxon(d).pvalue)
    assert 0.03 < statistics.signed_rank_p(d) < 0.05
    assert statistics.signed_rank_p(-d) == pytest.approx(statistics.signed_rank_p(d))


def test_signed_ranks_know_ties_and_zeros_by_value_not_by_rounding() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 400))
    d = a / 5 - b / 5
    assert len(np.unique(np.abs(d))) > 6, "rounding has made differences differ"
    assert statistics.signed_rank_p(d) == pytest.approx(scipy.stats.wilcoxon((a - b)[a != b]).pvalue)
    assert statistics.signed_rank_p(np.zeros(9)) == 1.0
    assert statistics.signed_rank_p(np.full(9, np.nan)) == 1.0


@pytest.mark.parametrize("metric", list(SHARES))
def test_signed_ranks_raise_false_alarms_as_rarely_as_promised(metric: str) -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(100):
        y = rng.normal(size=(200, 1)) if metric == "R2" else (rng.random(200) < 0.3).astype(int)
        hard = rng.normal(size=(200, 1))
        a, b = (y.reshape(200, 1) - 0.5 + hard + rng.normal(size=(200, 1)) for _ in range(2))
        alarms += statistics.signed_rank_p(SHARES[metric](a, y) - SHARES[metric](b, y)) < 0.05
    assert alarms / 100 < 0.12


def test_pareto_keeps_ties_in_neither_way_worse() -> None:
    assert pareto([0.9, 0.9, 0.8], [1.0, 2.0, 0.5]) == [0, 2]


@pytest.mark.parametrize("name", ["accuracy", "AUROC", "R2"])
def test_weights_that_are_too_many_are_made_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(60, 1)) if name == "R2" else (rng.random(60) < 0.5).astype(int)
    scores = [(y.reshape(60, 1) + rng.normal(size=(60, 1)))[None] for _ in range(2)]
    units = Units([str(i) for i in range(60)], [str(i % 13) for i in range(60)])
    slow = dataclasses.replace(Measure.known(name, y), shares=None, pair_shares=None)
    whole = Inference(slow, scores, units)
    expected = whole.interval(0), whole.differences([(0, 1)])
    monkeypatch.setattr(metrics, "WEIGHTS_AT_ONCE", 150)
    parts = Inference(slow, scores, units)
    assert parts.interval(0) == pytest.approx(expected[0], rel=1e-12)
    assert parts.differences([(0, 1)])[0][2] == pytest.approx(expected[1][0][2], rel=1e-12)
