"""Distances, separable tokens, Jacobians: against lists of all sets, loops and torch's own derivatives."""

from __future__ import annotations

import itertools
import math
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.mix.base import Normaliser
from cenote.mix.normalisers import NORMALISERS, normaliser
from cenote.mix.normalization_limits.measures import (
    critical_n,
    distance,
    distance_bound,
    distances,
    entropy,
    expected_distance_bound,
    expected_squared_distances,
    jacobian_norms,
    jacobian_of,
    permuted,
    separable,
    softmax_jacobian,
    softmax_range,
    spectral_norms,
    top_set,
    vanishing_range,
)
from cenote.mix.normalization_limits.scan import HeadScan
from cenote.models.live import recorded
from tests import tiny


def row(length: int = 7, dim: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return (2 * torch.randn(length)).double().softmax(-1), torch.randn(length, dim).double()


def test_the_distance_is_a_loop_over_what_is_not_selected() -> None:
    weights, x = row()
    chosen = weights.topk(3).indices.tolist()
    s = sum(weights[i] * x[i] for i in chosen)
    apart = [s - weights[j] * x[j] for j in range(7) if j not in chosen]
    torch.testing.assert_close(distance(weights, x, 3), sum(d.norm() for d in apart))
    torch.testing.assert_close(distance(weights, x, 3, mode="aggregate"), sum(apart).norm())


def test_the_bound_holds() -> None:
    torch.manual_seed(0)
    weights, x = (3 * torch.randn(300, 12)).double().softmax(-1), torch.randn(300, 12, 4).double()
    for n in range(1, 12):
        assert bool((distance(weights, x, n) <= distance_bound(weights, x, n) + 1e-9).all())


@pytest.mark.parametrize("name", NORMALISERS)
def test_the_bound_holds_whatever_weights_sum_to(name: str) -> None:
    torch.manual_seed(0)
    logits, x = 3 * torch.randn(100, 12).double(), torch.randn(100, 12, 4).double()
    weights = normaliser(name).double().eval()(logits).detach()
    for n in range(1, 12):
        assert bool((distance(weights, x, n) <= distance_bound(weights, x, n) + 1e-9).all())


def test_what_is_expected_of_a_random_set_is_the_mean_over_all_sets() -> None:
    weights, x = row()
    for n in (1, 2, 4, 6):
        squared, sums = torch.zeros(7).double(), []
        for chosen in itertools.combinations(range(7), n):
            selected = torch.zeros(7, dtype=torch.bool)
            selected[list(chosen)] = True
            away = distances(weights, x, selected)
            squared += torch.where(selected, 0.0, away.square())
            sums.append(float(distance(weights, x, n, selected=selected)))
        torch.testing.assert_close(expected_squared_distances(weights, x, n), squared / math.comb(6, n))
        assert sum(sums) / len(sums) <= expected_distance_bound(weights, x, n) + 1e-9


def test_weights_vanish_as_rows_grow() -> None:
    torch.manual_seed(0)
    for length in (4, 64, 1024):
        logits = (torch.rand(50, length) * 2 - 1).double()
        for temperature in (0.5, 1.0):
            low, high = softmax_range(1.0, length, temperature)
            weights = (logits / temperature).softmax(-1)
            assert low <= weights.min() <= weights.max() <= high
        low, high = vanishing_range(torch.sigmoid, 1.0, length)
        weights = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        assert low <= weights.min() <= weights.max() <= high
    assert softmax_range(800.0, 10) == (0.0, math.inf)
    assert softmax_range(1.0, 10) == pytest.approx((math.exp(-2) / 10, math.exp(2) / 10))


def test_separable_tokens_are_counted_within_the_radius() -> None:
    weights, x = row()
    found, chosen = separable(weights, x, 3), top_set(weights, 3)
    s = (weights[chosen, None] * x[chosen]).sum(0)
    away = (weights[:, None] * x - s).norm(dim=-1)
    torch.testing.assert_close(found.radius, away[~chosen].min())
    assert found.inside == (away[chosen] <= found.radius).sum()
    assert found.share == found.inside / 3
    i = int(chosen.nonzero()[0])
    others = chosen.clone()
    others[i] = False
    torch.testing.assert_close(found.spread[i], x.norm(dim=-1).max() * weights[others].square().sum().sqrt())
    torch.testing.assert_close(found.by_markov, 1 - found.spread.sum() / 3 / found.radius)


def test_lower_bounds_hold_of_independent_directions() -> None:
    torch.manual_seed(0)
    weights = (2 * torch.randn(20)).double().softmax(-1)
    x = torch.nn.functional.normalize(torch.randn(2000, 20, 16).double(), dim=-1)
    chosen = top_set(weights, 4)
    y = weights[:, None] * x
    s = (y * chosen[:, None]).sum(1, keepdim=True)
    radius = 0.5
    spread = separable(weights, x[0], 4).spread[chosen]
    for i, xi in zip(chosen.nonzero().flatten().tolist(), spread, strict=True):
        away = (y[:, i] - s[:, 0]).norm(dim=-1)
        torch.testing.assert_close(away.square().mean(), xi.square(), atol=0.01, rtol=0.1)
        assert (away <= radius).double().mean() >= 1 - xi.square() / radius**2 - 0.02


def test_nothing_and_all_selected_have_no_distance_and_no_share() -> None:
    weights, x = row()
    for n in (0, 7):
        assert distance(weights, x, n) == 0
        assert distance(weights, x, n, mode="aggregate") == 0
        assert distance_bound(weights, x, n) == 0
        assert bool(separable(weights, x, n).share.isnan())


def test_ties_go_to_the_lowest_index() -> None:
    assert top_set(torch.tensor([0.25] * 4), 2).tolist() == [True, True, False, False]


def test_uniform_weights_sum_to_the_mean_of_the_selected() -> None:
    _, x = row()
    weights = torch.zeros(7).double().softmax(-1)
    assert weights.tolist() == [1 / 7] * 7
    assert softmax_range(0.0, 7) == pytest.approx((1 / 7, 1 / 7))
    s = x[:2].sum(0) / 7
    torch.testing.assert_close(distance(weights, x, 2), (s - x[2:] / 7).norm(dim=-1).sum())


def test_of_equal_vectors_only_the_weights_count() -> None:
    weights, x = row()
    x = x[:1].expand(7, -1)
    chosen = top_set(weights, 2)
    mass = weights[chosen].sum()
    torch.testing.assert_close(distance(weights, x, 2), x[0].norm() * (mass - weights[~chosen]).abs().sum())


def test_a_mask_is_a_shorter_row() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([True, False, True, True, False, True, True])
    weights, x = torch.randn(7).double().masked_fill(~mask, -math.inf).softmax(-1), torch.randn(7, 3).double()
    short = weights[mask], x[mask]
    for function in (distance, distance_bound, expected_distance_bound):
        torch.testing.assert_close(function(weights, x, 2, mask), function(*short, 2))
    assert separable(weights, x, 2, mask).share == separable(*short, 2).share
    turned = permuted(weights, mask)
    assert torch.equal(turned.sort().values, weights.sort().values)
    assert not turned[~mask].any()


def test_the_jacobian_is_that_of_autograd_and_its_norms_are_its_own() -> None:
    torch.manual_seed(0)
    for temperature in (0.1, 1.0):
        logits = torch.randn(6).double()
        weights = (logits / temperature).softmax(-1)
        expected = torch.autograd.functional.jacobian(lambda z, t=temperature: (z / t).softmax(-1), logits)
        torch.testing.assert_close(softmax_jacobian(weights, temperature), expected)
        found = jacobian_norms(weights, temperature)
        torch.testing.assert_close(found.spectral, torch.linalg.matrix_norm(expected, 2))
        torch.testing.assert_close(found.frobenius, torch.linalg.matrix_norm(expected))
        torch.testing.assert_close(found.entry, expected.abs().max())
        assert found.entry <= found.entry_bound
        assert found.spectral <= found.spectral_bound
    for weights in (torch.tensor([1.0]), torch.tensor([1.0, 0.0]), torch.full((5,), 0.2)):
        expected = torch.linalg.matrix_norm(softmax_jacobian(weights.double()), 2)
        torch.testing.assert_close(jacobian_norms(weights).spectral, expected)


def test_norms_of_weights_that_do_not_sum_to_one_are_those_of_the_matrix() -> None:
    torch.manual_seed(0)
    for weights in (torch.rand(20, 6).double(), torch.rand(20, 6).double() / 9, torch.ones(1, 4), torch.zeros(1, 4)):
        matrix = softmax_jacobian(weights.double())
        found = jacobian_norms(weights)
        torch.testing.assert_close(found.spectral, torch.linalg.matrix_norm(matrix, 2))
        torch.testing.assert_close(found.frobenius, torch.linalg.matrix_norm(matrix))
        torch.testing.assert_close(found.entry, matrix.abs().amax((-2, -1)))


@pytest.mark.parametrize("name", NORMALISERS)
def test_every_normaliser_has_the_jacobian_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    made, logits = normaliser(name).double().eval(), torch.randn(3, 7).double()
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2, [False, True] * 3 + [False]])
    expected = [
        torch.linalg.matrix_norm(jacobian_of(made, row[read]), 2) for row, read in zip(logits, mask, strict=True)
    ]
    torch.testing.assert_close(spectral_norms(made, logits, mask), torch.stack(expected).detach())
    if name == "softmax":
        torch.testing.assert_close(spectral_norms(made, logits), jacobian_norms(logits.softmax(-1)).spectral)


class Ones(Normaliser):
    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.ones_like(scores) if mask is None else mask.to(scores)


def test_what_hangs_on_no_score_has_a_jacobian_of_zeros() -> None:
    assert spectral_norms(Ones(), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("name", "jacobian"), [("sparsemax", 1.0), ("sigmoid", 0.25), ("softmax", None)])
def test_a_scan_tells_the_jacobian_and_the_bound_of_its_normaliser(name: str, jacobian: float | None) -> None:
    library = tiny.transformers()
    torch.manual_seed(0)
    model = library.BertModel(library.BertConfig(**tiny.TEXT)).eval()
    for p in model.parameters():
        p.data.mul_(3)
    inputs = {"input_ids": torch.randint(0, 40, (2, 12))}
    made = normaliser(name, temperature=0.5) if name == "softmax" else name
    heads = HeadScan(n=2, normaliser=made, temperature=2.0).scan(model, inputs).heads
    assert all(h.distance <= h.bound + 1e-9 for h in heads)
    if jacobian is None:
        plain = HeadScan(n=2).scan(model, inputs).heads
        # 2 times 0.5
        assert [h.jacobian for h in heads] == pytest.approx([h.jacobian for h in plain])
    else:
        assert all(0.8 * jacobian / 2 < h.jacobian <= jacobian / 2 + 1e-6 for h in heads)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_two_equal_weights_have_twice_the_norm_that_is_claimed(temperature: float) -> None:
    found = jacobian_norms(torch.tensor([0.5, 0.5]), temperature)
    assert float(found.spectral) == pytest.approx(1 / (2 * temperature), rel=1e-12)
    assert found.spectral > found.claimed
    assert float(found.frobenius) == pytest.approx(1 / (2 * temperature))


@pytest.mark.parametrize("name", NORMALISERS)
def test_every_normaliser_can_be_diagnosed(name: str) -> None:
    torch.manual_seed(0)
    logits, x = torch.randn(9).double(), torch.randn(9, 4).double()
    made = normaliser(name).double().eval()
    weights = made(logits)
    assert bool(distance(weights, x, 2).isfinite())
    assert jacobian_of(made, logits).shape == (9, 9)
    if "sigmoid" not in name or "normalised" in name:
        assert float(weights.sum()) == pytest.approx(1)


def test_sharp_rows_differ_from_random_sets_and_flat_ones_do_not() -> None:
    torch.manual_seed(0)
    x, generator = torch.randn(60, 100, 8).double(), torch.Generator().manual_seed(0)
    flat, sharp = torch.full((60, 100), 0.01).double(), torch.zeros(60, 100).double()
    sharp[:, :20] = 0.05
    assert critical_n(flat, x, (3, 5, 9), generator=generator) == 3
    assert critical_n(sharp, x, (5, 10, 20), generator=generator) is None
    assert critical_n(permuted(flat), x, generator=generator) == 1
    assert float(entropy(flat)[0]) == pytest.approx(math.log(100))
    with pytest.raises(InputError, match="candidates: expected 1 to 99 of 100 tokens, got 100"):
        critical_n(sharp, x, (100,))
    with pytest.raises(InputError, match="n: 7 of the others"):
        expected_squared_distances(*row(), 7)


@pytest.fixture(scope="module")
def llama() -> Any:
    library = tiny.transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = library.LlamaForCausalLM(library.LlamaConfig(vocab_size=30, intermediate_size=16, **sizes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(20 if "q_proj" in name else 4)
    return model


def test_heads_of_a_running_model_are_measured_row_by_row(llama: Any) -> None:
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(0, 30, (1, 24))}
    before = llama(**inputs).logits
    found = HeadScan(n=3, rows=4).scan(llama, inputs)
    assert len(found.heads) == 8
    assert torch.equal(llama(**inputs).logits, before)
    with recorded(llama, "inputs") as seen:
        llama(**inputs)
    call = list(seen["inputs"].values())[1][0]
    rows = []
    for i in range(20, 24):
        weights = call.weights()[0, 3, i, : i + 1].double()
        rows.append(distance(weights, call.v[0, 1, : i + 1].double(), 3))
    assert found.heads[7].distance == pytest.approx(float(sum(rows) / 4), rel=1e-5)
    assert all(h.distance <= h.bound for h in found.heads)
    assert found.table().count("\n") == 8
    assert "of 8 heads are flat at 24 tokens" in found.sentence()
    picture = ElementTree.fromstring(found.figure("separable"))
    assert len(picture.findall("{http://www.w3.org/2000/svg}rect")) == 8
    with pytest.raises(InputError, match="measure"):
        found.figure("colour")
    with pytest.raises(InputError, match="length"):
        found.figure(length=7)
    without = HeadScan(n=3, rows=4, without_first=1).scan(llama, inputs)
    assert without.heads[0].distance != found.heads[0].distance


@pytest.mark.parametrize("name", ["softmax", "sparsemax", "sigmoid"])
def test_encoders_lengths_embeddings_and_other_normalisers_are_scanned(name: str) -> None:
    library = tiny.transformers()
    torch.manual_seed(0)
    model = library.BertModel(library.BertConfig(**{**tiny.TEXT, "max_position_embeddings": 64})).eval()
    inputs = {"input_ids": torch.randint(0, 40, (2, 40))}
    scan = HeadScan(n=3, vectors="embeddings", normaliser=name, rows=12, temperature=0.5)
    found = scan.scan(model, inputs, lengths=(10, 20, 40))
    assert len(found.heads) == 3 * 12
    slope, fit = found.growth()
    if name == "softmax":
        assert slope > 0
        assert fit > 0.5
        assert all(0 < h.critical <= 0.5 for h in found.heads if not math.isnan(h.critical))
    with pytest.raises(InputError, match="lengths: 41 tokens"):
        scan.scan(model, inputs, lengths=(41,))
    with pytest.raises(InputError, match="n: 3 top tokens, and a row reads 3"):
        scan.scan(model, inputs, lengths=(3,))
    with pytest.raises(InputError, match="lengths: a line needs three"):
        scan.scan(model, inputs).growth()
