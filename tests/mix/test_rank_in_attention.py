"""Heads as wide as one likes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cenote.mix.rank_in_attention.layers import RankAttention
from cenote.mix.rank_in_attention.theory import (
    expected_error,
    head_gram,
    head_target,
    optimal_weights,
    vote_is_right,
)


def sphere(*shape: int) -> Tensor:
    return normalize(torch.randn(shape), dim=-1)


def picks(x: Tensor, y: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Of each head, x_1 or x_2: `[samples, heads, dim]`."""
    first = ((x[:, 0] - x[:, 1]) @ keys.T) * (y @ queries.T) > 0
    return torch.where(first[..., None], x[:, None, 0], x[:, None, 1])


def test_the_exact_solution_gives_the_nearest_point() -> None:
    torch.manual_seed(0)
    for count in (1, 2, 50):
        x, y = sphere(3, count, 8), sphere(3, 4, 8)
        nearest = x.gather(1, (y @ x.mT).argmax(-1, keepdim=True).expand(-1, -1, 8))
        assert torch.equal(RankAttention.exact(8).attend(x, y), nearest)
        torch.testing.assert_close(RankAttention.exact(8, temperature=1e6, hard=False).attend(x, y), nearest)


def test_turning_points_and_queries_turns_the_output() -> None:
    torch.manual_seed(0)
    x, y, turn = sphere(2, 6, 8), sphere(2, 3, 8), torch.linalg.qr(torch.randn(8, 8))[0]
    exact = RankAttention.exact(8)
    torch.testing.assert_close(exact.attend(x @ turn, y @ turn), exact.attend(x, y) @ turn)


def test_full_rank_with_orthogonal_maps_is_the_identity() -> None:
    torch.manual_seed(0)
    x, y = sphere(2, 6, 8), sphere(2, 3, 8)
    torch.testing.assert_close(RankAttention.majority(8, 8, 1).attend(x, y), RankAttention.exact(8).attend(x, y))


@pytest.mark.parametrize("hard", [False, True])
def test_copies_of_a_head_are_one_head(hard: bool) -> None:
    torch.manual_seed(0)
    one, many = RankAttention(8, 3, 1, hard), RankAttention(8, 3, 5, hard)
    with torch.no_grad():
        many.query.copy_(one.query.expand(5, -1, -1))
        many.key.copy_(one.key.expand(5, -1, -1))
        many.value_output.copy_(one.value_output.expand(5, -1, -1) / 5)
    x, y = sphere(2, 6, 8), sphere(2, 3, 8)
    torch.testing.assert_close(many.attend(x, y), one.attend(x, y))


def test_ties_have_measure_zero_and_go_to_the_first() -> None:
    x = torch.eye(3)[None, [0, 1, 1, 2]]
    layer = RankAttention.exact(3)
    assert layer.weights_of(x)[0, 0].argmax(-1).tolist() == [0, 1, 1, 3]
    torch.manual_seed(0)
    scores = sphere(50, 20, 8) @ sphere(50, 8, 1)
    assert bool((scores.squeeze(-1).sort(-1).values.diff(dim=-1) > 0).all())


def test_it_starts_as_published_and_has_so_many_parameters() -> None:
    layer = RankAttention(8, rank=3, heads=5)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 5 * 3 * 8 + 5 * 8**2
    for parameter, bound in ((layer.query, math.sqrt(6 / 11)), (layer.value_output, math.sqrt(6 / 48))):
        assert bound * 0.9 < parameter.abs().max() <= bound


def test_padding_is_not_read() -> None:
    torch.manual_seed(0)
    x, mask = sphere(1, 5, 8), torch.tensor([[True, True, False, True, False]])
    for hard in (False, True):
        layer = RankAttention(8, 2, 3, hard)
        torch.testing.assert_close(layer(x, mask)[:, mask[0]], layer(x[:, mask[0]]))
        assert not layer.attend(x, x, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_what_heads_have_in_common_is_what_is_seen(dim: int) -> None:
    torch.manual_seed(dim)
    queries, keys = sphere(6, dim), sphere(6, dim)
    keys[0] = queries[0]
    x, y = sphere(40_000, 2, dim), sphere(40_000, dim)
    heads = picks(x, y, queries, keys)
    nearest = x.gather(1, (x @ y[..., None]).argmax(1, keepdim=True).expand(-1, -1, dim))[:, 0]
    seen = torch.einsum("shd,sgd->hg", heads, heads) / len(x)
    assert (head_gram(queries, keys) - seen).abs().max() < 0.03
    assert (head_target(queries, keys) - (heads * nearest[:, None]).sum(-1).mean(0)).abs().max() < 0.03
    a, error = optimal_weights(queries, keys)
    seen_error = (torch.einsum("h,shd->sd", a, heads) - nearest).square().sum(-1).mean()
    assert abs(float(error - seen_error)) < 0.04


def test_the_series_is_the_closed_form_of_the_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    from cenote.mix.rank_in_attention import theory

    torch.manual_seed(0)
    queries, keys = sphere(20, 2).double(), sphere(20, 2).double()
    series = 0.5 + theory._series(2, (queries * keys).sum(-1).numpy(), 400) / math.pi
    torch.testing.assert_close(torch.from_numpy(series), head_target(queries, keys), atol=1e-5, rtol=0)
    high = theory._series(16, (queries * keys).sum(-1).numpy(), 400)
    torch.testing.assert_close(high, theory._series(16, (queries * keys).sum(-1).numpy(), 200), atol=1e-5, rtol=0)


def test_no_other_weights_are_expected_to_do_better() -> None:
    torch.manual_seed(0)
    queries, keys = sphere(10, 5).double(), sphere(10, 5).double()
    a, error = optimal_weights(queries, keys)
    gram, target = head_gram(queries, keys), head_target(queries, keys)
    assert all(error < expected_error(a + 0.1 * torch.randn(10), gram, target) for _ in range(20))


def test_votes_are_right_as_often_as_the_angle_says() -> None:
    torch.manual_seed(0)
    apart, y, heads = sphere(1, 4), sphere(1, 4), sphere(40_000, 4)
    angle = (apart * y).sum().acos()
    agreed = ((apart @ heads.T) * (y @ heads.T) > 0).float().mean()
    right = agreed if angle < math.pi / 2 else 1 - agreed
    assert abs(float(vote_is_right(angle) - right)) < 0.02
