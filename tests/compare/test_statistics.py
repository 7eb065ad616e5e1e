import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from cenote.compare import statistics
from cenote.compare.metrics import SHARES, accuracy
from cenote.compare.pareto import pareto


def test_holm_agrees_with_statsmodels() -> None:
    p = np.random.default_rng(0).uniform(size=12) ** 3
    assert statistics.holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist())


def _scores(right: np.ndarray) -> np.ndarray:
    """Logits of two classes that are right exactly where told, for targets of all ones."""
    return np.stack([~right, right], -1).astype(float)[None]


def test_the_interval_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.7
    samples = statistics.resampled_metrics(accuracy, [_scores(right)], np.ones(200, int), np.arange(200))
    theirs = scipy.stats.bootstrap((right.astype(float),), np.mean, method="percentile", n_resamples=9999, rng=1)
    assert statistics.interval(samples[0]) == pytest.approx(tuple(theirs.confidence_interval), abs=0.011)


def test_resampling_whole_groups_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    right = (rng.random(20) < 0.7)[groups]
    alone = statistics.resampled_metrics(accuracy, [_scores(right)], np.ones(200, int), np.arange(200))
    together = statistics.resampled_metrics(accuracy, [_scores(right)], np.ones(200, int), groups)
    assert np.std(together[0]) > 2 * np.std(alone[0])


def test_the_paired_test_finds_a_real_difference_and_no_other() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.6
    better = base | (rng.random(400) < 0.3)
    same = rng.permutation(base)
    a, b, c = statistics.resampled_metrics(
        accuracy, [_scores(base), _scores(better), _scores(same)], np.ones(400, int), np.arange(400)
    )
    assert statistics.two_sided_p(b - a) <= 2 / 9999
    assert statistics.two_sided_p(c - a) > 0.5
    assert statistics.two_sided_p(np.zeros(99)) == 1.0


def test_false_alarms_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for trial in range(200):
        a, b = rng.random(150) < 0.7, rng.random(150) < 0.7
        s = statistics.resampled_metrics(
            accuracy, [_scores(a), _scores(b)], np.ones(150, int), np.arange(150), resamples=499, seed=trial
        )
        alarms += statistics.two_sided_p(s[0] - s[1]) < 0.05
    assert alarms / 200 < 0.1


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
