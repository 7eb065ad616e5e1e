import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from cenote.compare import Arm, Cell, Comparison, Folds, Measure, Units, judge
from cenote.compare.arms import OnShare, unheard
from cenote.compare.engine import Measured
from cenote.compare.folds import Resampled
from cenote.compare.intervals import Spread, interval
from cenote.core import InputError

FOLDS = Folds(np.repeat(np.arange(5), 4), (12,) * 5)
"""Five folds of four units, each trained on twelve."""
UNITS = Units([f"u{i}" for i in range(20)])


def resampled(per_fold: list[list[float]], **more: Any) -> Resampled:
    """Of arms with one seed, whose units all score what their fold does."""
    return Resampled(Measure("mean"), [np.repeat(f, 4)[None] for f in np.array(per_fold)], UNITS, FOLDS, **more)


def test_the_corrected_t_test_by_hand() -> None:
    first, second = [0.9, 0.8, 0.85, 0.9, 0.8], [0.8, 0.75, 0.8, 0.75, 0.75]
    found = resampled([first, second])
    ((difference, (low, high), p),) = found.differences([(0, 1)])
    # differences 0.10, 0.05, 0.05, 0.15, 0.05: mean 0.08, squares about it sum to 0.008
    assert difference == pytest.approx(0.08)
    error = math.sqrt((1 / 5 + 4 / 12) * 0.008 / 4)
    assert p == pytest.approx(2 * scipy.stats.t.sf(0.08 / error, 4))
    reach = scipy.stats.t.ppf(0.975, 4) * error
    assert (low, high) == pytest.approx((0.08 - reach, 0.08 + reach))
    assert found.means == pytest.approx([0.85, 0.77])
    assert found.of_arm(1)["metric_per_fold"] == pytest.approx(second)
    assert found.provenance()["correction"] == pytest.approx(8 / 15)


def test_without_shared_training_items_it_would_be_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    per_fold = rng.normal(size=(2, 5))
    endless = dataclasses.replace(FOLDS, trained_on=(10**12,) * 5)
    arms = [np.repeat(f, 4)[None] for f in per_fold]
    ((*_, p),) = Resampled(Measure("mean"), arms, UNITS, endless).differences([(0, 1)])
    assert p == pytest.approx(scipy.stats.ttest_rel(*per_fold).pvalue)


def test_the_metric_is_taken_in_each_fold() -> None:
    rng = np.random.default_rng(1)
    y = np.tile([0, 0, 1, 1], 5)
    # each fold has scores of its own size: over all items together the ranks would be other ones
    scores = rng.normal(size=(2, 20, 1)) + 10 * np.repeat(np.arange(5), 4)[:, None]
    found = Resampled(Measure.known("AUROC", y), [scores], UNITS, FOLDS)
    by_hand = [
        [
            np.mean([s[i] > s[j] for i in range(f, f + 4) for j in range(f, f + 4) if y[i] > y[j]])
            for f in range(0, 20, 4)
        ]
        for s in scores[..., 0]
    ]
    assert found.per_seed[0] == pytest.approx(np.mean(by_hand, 1).tolist())
    assert found.of_arm(0)["metric_per_fold"] == pytest.approx(np.mean(by_hand, 0).tolist())


def test_an_interval_of_a_share_stays_between_its_limits_and_has_a_width() -> None:
    y = np.ones(20, int)
    right = np.ones((1, 20, 1))
    found = Resampled(Measure.known("accuracy", y), [right], UNITS, FOLDS)
    # as many units as would have this variance, were they independent: 4 / (1 / 5 + 4 / 12)
    assert found.interval(0) == pytest.approx(interval(1.0, Spread(0.0, 4.0), (0.0, 1.0), 7.5))
    assert 0.4 < found.interval(0)[0] < 0.8
    assert found.interval(0)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("second", [[0.5] * 5, [0.4, 0.5, 0.6, 0.7, 0.8]])
def test_folds_that_all_differ_alike_do_not_tell_how_much_others_would(second: list[float]) -> None:
    ((difference, (low, high), p),) = resampled([[v + 0.1 for v in second], second]).differences([(0, 1)])
    assert difference == pytest.approx(0.1)
    assert p == 1.0
    assert math.isnan(low)
    assert math.isnan(high)
    assert resampled([second, second]).differences([(0, 1)]) == [(0.0, (0.0, 0.0), 1.0)]


def test_other_seeds_add_their_variance() -> None:
    rng = np.random.default_rng(2)
    arms = [rng.normal(size=(3, 20)) for _ in range(2)]
    ((_, fixed, p),) = Resampled(Measure("mean"), arms, UNITS, FOLDS).differences([(0, 1)])
    ((_, random, q),) = Resampled(Measure("mean"), arms, UNITS, FOLDS, "random").differences([(0, 1)])
    assert random[1] - random[0] > fixed[1] - fixed[0]
    assert q > p
    with pytest.raises(InputError, match="at least 2 seeds"):
        resampled([[0.1] * 5], seed_effects="random")


def test_rounds_of_folds_make_no_more_of_few_groups() -> None:
    groups = np.repeat(np.arange(5), 4)
    rounds = Folds(np.repeat(np.arange(15), 4), (12,) * 15)
    per_unit = np.repeat([0.1, 0.05, 0.05, 0.15, 0.05], 4)
    once = Resampled(
        Measure("mean"), [per_unit[None], np.zeros((1, 20))], Units(UNITS.names, list(map(str, groups))), FOLDS
    )
    many = Units([*UNITS.names] * 3, [*map(str, groups)] * 3)
    again = Resampled(Measure("mean"), [np.tile(per_unit, 3)[None], np.zeros((1, 60))], many, rounds)
    ((*_, p),), ((*_, q),) = once.differences([(0, 1)]), again.differences([(0, 1)])
    assert q == pytest.approx(p)


def test_folds_that_do_not_fit_are_told() -> None:
    with pytest.raises(InputError, match="two folds or more"):
        Folds(np.zeros(4, int), (12,))
    with pytest.raises(InputError, match=r"folds 0 to 1, got them in \[0\]"):
        Folds(np.zeros(4, int), (12, 12))
    with pytest.raises(InputError, match="one for each of 3 units, got 20"):
        Resampled(Measure("mean"), [np.zeros((1, 3))], Units("abc"), FOLDS)


class Known(Arm):
    def __init__(self, name: str) -> None:
        self.name = name

    def key(self) -> dict[str, Any]:
        return {}

    def run(self, on_share: OnShare = unheard) -> Cell:
        raise NotImplementedError


def test_judge_takes_folds_as_it_takes_one_split() -> None:
    rng = np.random.default_rng(3)
    better = {"base": 0.0, "good": 2.0, "same": 0.02}
    noise = rng.normal(size=(1, 20)) * 0.1
    scores = {n: noise + d + 0.1 * rng.normal(size=(2, 20)) for n, d in better.items()}
    cells = {n: Cell(n, {"seconds": 1.0}, {"scores": torch.as_tensor(s)}) for n, s in scores.items()}
    measured = Measured(tuple(map(Known, better)), cells, {})
    c = judge(Comparison, measured, UNITS, Measure("score"), baseline="base", folds=FOLDS)
    assert c.winner == "good"
    assert c.sentence.startswith("good beats base by 1.982")
    assert c.provenance["significance"] == "corrected t"
    assert len(c["good"].metric_per_fold) == 5
    assert len(c["good"].metric_per_seed) == 2
    assert Comparison.from_json(c.to_json()) == c
    assert judge(Comparison, measured, UNITS, Measure("score"), baseline="base")["good"].metric_per_fold == ()
