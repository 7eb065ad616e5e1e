"""Faithfulness measures against closed forms."""

from __future__ import annotations

import pytest
import torch

from cenote.core import InputError
from cenote.explain import metrics

REAL = torch.tensor([[True] * 10, [True] * 3 + [False] * 7])
SCORES = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) * REAL


def test_shares_are_whole_units_one_at_least_and_all_at_most() -> None:
    assert metrics.counted(REAL, (0.01, 0.1, 0.11, 0.5, 1.0)).tolist() == [[1, 1, 2, 5, 10], [1, 1, 1, 2, 3]]


def test_masks_take_the_largest_away_or_keep_them() -> None:
    without, only = metrics.without_top(SCORES, REAL), metrics.only_top(SCORES, REAL)
    for item, real in enumerate(REAL):
        order = [i for i in SCORES[item].argsort(descending=True).tolist() if real[i]]
        for share, count in enumerate(metrics.counted(REAL)[item].tolist()):
            assert set(only[item, share].nonzero()[:, 0].tolist()) == set(order[:count])
            left = (without[item, share] & real).nonzero()[:, 0].tolist()
            assert set(left) == set(order[count:])


def test_padding_never_ranks_before_a_unit_of_negative_score() -> None:
    ranks = metrics.ranked(torch.tensor([[-5.0, -7.0, 0.0]]), torch.tensor([[True, True, False]]))
    assert ranks.tolist() == [[0, 1, 2]]


def test_infidelity_of_an_additive_output_is_nothing_whatever_the_scale() -> None:
    keep = torch.rand(2, 30, 10, generator=torch.Generator().manual_seed(1)) > 0.5
    fall = (~keep * SCORES[:, None]).sum(2)
    for factor in (1.0, 17.0):
        assert metrics.infidelity(factor * SCORES, keep, fall).max() < 1e-6
    # scores that say the opposite are not turned round
    torch.testing.assert_close(metrics.infidelity(-SCORES, keep, fall), torch.ones(2))


def test_sparsity_does_not_see_padding_scale_or_order() -> None:
    alone = metrics.sparsity(SCORES[1:, :3], REAL[1:, :3])
    torch.testing.assert_close(metrics.sparsity(SCORES, REAL)[1:], alone)
    torch.testing.assert_close(
        metrics.sparsity(-3 * SCORES[:1].flip(1), REAL[:1]), metrics.sparsity(SCORES[:1], REAL[:1])
    )
    assert metrics.sparsity(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)).tolist() == [0.0]


def test_curves_are_areas_over_rising_shares() -> None:
    assert metrics.area(torch.tensor([[1.0, 1.0, 0.0]]), (0.0, 0.5, 1.0)).tolist() == [0.75]
    with pytest.raises(InputError, match="at: expected 3 rising shares"):
        metrics.area(torch.ones(1, 3), (0.0, 1.0, 0.5))


def test_agreement_and_overlap_see_real_units_only() -> None:
    other = SCORES.clone()
    other[1, 3:] = 9.0
    assert metrics.agreement(SCORES, other, REAL).tolist() == [1.0, 1.0]
    assert metrics.top_overlap(SCORES, other, REAL).tolist() == [1.0, 1.0]
    assert metrics.top_overlap(SCORES, -SCORES, REAL).tolist() == [0.0, 0.0]
