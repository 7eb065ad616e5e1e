"""Alignments, distributions, positions and representations, against each other and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import cenote
from cenote.core import InputError
from cenote.mix.attention_survey.alignments import ALIGNMENTS, KernelAlignment, alignment
from cenote.mix.attention_survey.attention import (
    CoAttention,
    GeneralAttention,
    LocalPositions,
    MultiDimensionalAttention,
    MultiRepresentationalAttention,
    Near,
)
from cenote.mix.attention_survey.hard import Baseline, reinforce, sampled
from cenote.mix.attention_survey.registry import find_attention, records
from cenote.mix.normalisers import GumbelSoftmax, Hardmax, Softmax, entmax15, normaliser, sparsemax
from cenote.mix.scored_attention import ScoredAttention


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 1, 3, 4), torch.randn(2, 1, 5, 4)


def test_general_with_the_identity_is_dot() -> None:
    q, k = inputs()
    general = alignment("general", 4)
    with torch.no_grad():
        general.weight.copy_(torch.eye(4))
    torch.testing.assert_close(general(q, k), alignment("dot", 4)(q, k))
    for name in ("biased general", "activated general"):
        settings = {"activation": torch.nn.Identity()} if name == "activated general" else {}
        other = alignment(name, 4, **settings)
        with torch.no_grad():
            other.weight.copy_(general.weight)
        torch.testing.assert_close(other(q, k), general(q, k))


def test_concat_with_both_maps_is_additive_and_so_is_deep_of_two() -> None:
    q, k = inputs()
    additive, concat, deep = alignment("additive", 4), alignment("concat", 4), alignment("deep", 4, layers=2)
    with torch.no_grad():
        concat.weight.copy_(torch.cat([additive.of_query, additive.of_key], 1))
        concat.out.copy_(additive.out)
    deep.first.load_state_dict(additive.state_dict())
    torch.testing.assert_close(concat(q, k), additive(q, k))
    torch.testing.assert_close(deep(q, k), additive(q, k))
    by_hand = torch.tanh(additive.of_query @ q[1, 0, 2] + additive.of_key @ k[1, 0, 4])
    torch.testing.assert_close(additive(q, k)[1, 0, 2, 4], additive.out[0] @ by_hand)


def test_scaled_dot_is_torchs_own() -> None:
    q, k = inputs()
    layer = GeneralAttention(4)
    torch.testing.assert_close(layer(k[:, 0], q[:, 0]).context, scaled_dot_product_attention(q, k, k)[:, 0])


def test_kernels_divide_by_their_sum_in_linear_time() -> None:
    q, k = inputs()
    mask = torch.tensor([[True, True, False, True, True], [False] * 5])
    kernel = KernelAlignment(4, 4)
    phi = [torch.nn.functional.elu(x) + 1 for x in (q, k)]
    scores = phi[0] @ phi[1].mT
    torch.testing.assert_close(kernel(q, k).softmax(-1), scores / scores.sum(-1, keepdim=True))
    layer = GeneralAttention(4, "kernel")
    torch.testing.assert_close(kernel.attend(q, k, k, mask)[:, 0], layer(k[:, 0], q[:, 0], mask=mask).context)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_every_alignment_works_with_heads_masks_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    x, q = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    layer = GeneralAttention(8, name, query_dim=6, heads=2)
    found = layer(x, q, mask=mask)
    assert found.context.shape == (2, 3, 8)
    assert not found.weights[1, :, :, ~mask[1]].any()
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 2, 3))
    found.context.square().sum().backward()
    assert all(p.grad is not None for p in layer.alignment.parameters())
    short = layer(x[1:, [0, 2]], q[1:])
    if name != "location-based":
        torch.testing.assert_close(found.context[1:], short.context)


def test_sparsemax_of_two_scores_is_a_clipped_line() -> None:
    z = torch.linspace(-3, 3, 61).double()
    found = sparsemax(torch.stack([z, torch.zeros_like(z)], -1))
    torch.testing.assert_close(found[:, 0], ((z + 1) / 2).clamp(0, 1))


def test_sparse_weights_solve_their_problems_and_have_their_jacobians() -> None:
    torch.manual_seed(0)
    z = torch.randn(40, 9).double()
    p = sparsemax(z)
    torch.testing.assert_close(p.sum(-1), torch.ones(40).double())
    other = (2 * torch.randn(40, 9)).double().softmax(-1)
    assert bool(((p - z).square().sum(-1) <= (other - z).square().sum(-1)).all())
    support = (p[0] > 0).double()
    jacobian = torch.autograd.functional.jacobian(sparsemax, z[0])
    torch.testing.assert_close(jacobian, torch.diag(support) - support[:, None] * support / support.sum())
    e = entmax15(z)
    threshold = z / 2 - e.sqrt()
    on = e > 0
    torch.testing.assert_close(e.sum(-1), torch.ones(40).double())
    for i in range(40):
        t = threshold[i][on[i]]
        assert float(t.max() - t.min()) < 1e-9
        assert bool((z[i][~on[i]] / 2 <= t[0] + 1e-12).all())
    for function in (sparsemax, entmax15):
        assert torch.autograd.gradcheck(function, (z[:3].clone().requires_grad_(),))


def test_temperatures_end_at_the_largest_and_at_the_mean() -> None:
    z = torch.randn(3, 6)
    torch.testing.assert_close(Softmax(1e-4)(z), Hardmax()(z))
    torch.testing.assert_close(Softmax(1e6)(z), torch.full((3, 6), 1 / 6))


def test_rows_that_may_read_nothing_give_zeros_whatever_the_distribution() -> None:
    z, mask = torch.randn(3, 6, requires_grad=True), torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    mask[2, 4] = False
    for name in (
        "softmax",
        "scalable softmax",
        "self-adjusted softmax",
        "sparsemax",
        "entmax15",
        "sigmoid",
        "hard",
        "gumbel",
    ):
        made = normaliser(name)
        weights = made(z, mask)
        assert not weights[1].any()
        assert weights[2, 4] == 0
        assert bool(weights.isfinite().all())
        (gradient,) = torch.autograd.grad((weights * torch.randn(3, 6)).sum(), z)
        assert bool(gradient.isfinite().all())
        torch.testing.assert_close(made.eval()(z.detach().masked_fill(~mask, -math.inf)), made(z.detach(), mask))
    layer = GeneralAttention(4, heads=2)
    assert not layer(torch.randn(1, 3, 4), mask=torch.zeros(1, 3, dtype=torch.bool)).context.any()


def test_sparsemax_with_masked_scores_is_finite() -> None:
    z = torch.tensor([[0.5, -math.inf, 0.3]])
    torch.testing.assert_close(sparsemax(z), torch.tensor([[0.6, 0.0, 0.4]]))
    torch.testing.assert_close(sparsemax(1e30 * z), torch.tensor([[1.0, 0.0, 0.0]]))


def test_of_equal_scores_the_lowest_index_is_taken() -> None:
    assert Hardmax()(torch.tensor([[1.0, 2.0, 2.0]])).tolist() == [[0.0, 1.0, 0.0]]


def test_a_single_key_has_all_the_weight_and_of_a_sigmoid_its_own() -> None:
    z = torch.tensor([[0.7]])
    for name in ("softmax", "sparsemax", "entmax15", "hard"):
        assert normaliser(name)(z).tolist() == [[1.0]]
    torch.testing.assert_close(normaliser("sigmoid")(z), z.sigmoid())
    assert normaliser("normalised sigmoid")(z).tolist() == [[1.0]]


def test_places_refuse_longer_inputs_than_they_were_built_for() -> None:
    q, k = inputs()
    with pytest.raises(InputError, match="k: 5 keys, and this alignment knows 4 places"):
        alignment("location-based", 4, most=4)(q, k)
    placed = alignment("location-based", 4, most=9)
    torch.testing.assert_close(placed(q, k), placed(q, torch.zeros_like(k)))
    with pytest.raises(InputError, match="key_width: DotAlignment"):
        alignment("dot", 4, 5)
    with pytest.raises(InputError, match="alignment: 'dot' does not take hidden"):
        alignment("dot", 4, hidden=5)
    with pytest.raises(InputError, match="normaliser: 'sparsemax' does not take temperature"):
        normaliser("sparsemax", temperature=2)


def test_gradients_of_hard_attention_are_those_of_the_expectation_in_the_mean() -> None:
    torch.manual_seed(0)
    scores, values = torch.randn(4).double().requires_grad_(), torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    (expected,) = torch.autograd.grad(-(scores.softmax(-1) * values).sum(), scores)
    rows = scores.expand(20_000, 4)
    drawn = sampled(rows)
    reward = drawn.weights @ values
    baseline = Baseline()
    baseline(reward)
    for b in (0.0, baseline(reward)):
        (found,) = torch.autograd.grad(reinforce(drawn.log_probability, reward, b), scores, retain_graph=True)
        torch.testing.assert_close(found, expected, atol=0.06, rtol=0)
    soft = scores.softmax(-1)
    (straight,) = torch.autograd.grad(-(Hardmax()(scores) * values).sum(), scores)
    torch.testing.assert_close(straight, torch.autograd.grad(-(soft * values).sum(), scores)[0])


def test_gumbel_samples_are_as_frequent_as_the_softmax_says_and_anneal() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4)
    gumbel = GumbelSoftmax(0.5, hard=True)
    seen = gumbel(scores.expand(20_000, 4)).mean(0)
    torch.testing.assert_close(seen, scores.softmax(-1), atol=0.02, rtol=0)
    assert gumbel.anneal(10_000) == math.exp(-0.3)
    assert gumbel.anneal(10**9) == 0.5
    torch.testing.assert_close(gumbel.eval()(scores), Hardmax()(scores))


def test_a_wide_window_without_a_slope_is_global() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4)
    everywhere = GeneralAttention(4)(x)
    for kind in ("monotonic", "predictive"):
        local = LocalPositions(kind, 6, 4, sigma=1e6)
        torch.testing.assert_close(GeneralAttention(4, local=local)(x).context, everywhere.context)
    near = GeneralAttention(4, local=LocalPositions("monotonic", 1))(x).weights[0, 0]
    at = torch.arange(6)
    assert torch.equal(near > 0, (at[:, None] - at).abs() <= 1)
    predicted = LocalPositions("predictive", 2, 4)
    factor = predicted(x, torch.ones(2, 6, dtype=torch.bool))
    centre = 6 * predicted.predict(x).squeeze(-1).sigmoid()
    away = at - centre[..., None]
    torch.testing.assert_close(factor, (-away.square() / 2).exp() * (away.abs() <= 2))
    with pytest.raises(InputError, match="query_dim"):
        LocalPositions("predictive", 2)


def padded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens with padding before, between and behind."""
    at = torch.tensor([2, 3, 5, 6, 9])
    wide = torch.full((len(x), 11, x.shape[-1]), 7.0, dtype=x.dtype).index_copy(1, at, x)
    return wide, torch.zeros(len(x), 11, dtype=torch.bool).index_fill(1, at, True)


@pytest.mark.parametrize("kind", ["monotonic", "predictive"])
def test_where_a_query_looks_does_not_hang_on_padding(kind: Near) -> None:
    torch.manual_seed(0)
    layer = GeneralAttention(4, local=LocalPositions(kind, 1, 4))
    x = torch.randn(2, 5, 4)
    wide, mask = padded(x)
    found = layer(wide, mask=mask)
    torch.testing.assert_close(found.context[mask].view(2, 5, 4), layer(x).context)
    of_others = torch.randn(2, 3, 4)
    torch.testing.assert_close(layer(wide, of_others, mask=mask).context, layer(x, of_others).context)


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_scores_do_not_hang_on_padding(name: str) -> None:
    torch.manual_seed(0)
    layer = GeneralAttention(4, name, settings={"most": 5} if name == "location-based" else {})
    x = torch.randn(2, 5, 4)
    wide, mask = padded(x)
    torch.testing.assert_close(layer(wide, mask=mask).context[mask].view(2, 5, 4), layer(x).context)


def test_a_place_that_no_weight_was_built_for_is_refused() -> None:
    layer = GeneralAttention(4, "location-based", settings={"most": 4})
    with pytest.raises(InputError, match="positions: expected places of keys from 0 to 3, got 0 to 4"):
        layer(torch.zeros(1, 5, 4))


def test_location_based_scores_make_a_mixer() -> None:
    torch.manual_seed(0)
    mixer = ScoredAttention(8, 2, scores=alignment("location-based", 4))
    x = torch.randn(2, 5, 8)
    wide, mask = padded(x)
    torch.testing.assert_close(mixer(wide, mask)[mask].view(2, 5, 8), mixer(x))


def test_tied_scores_are_ordinary_attention() -> None:
    torch.manual_seed(0)
    h, mask = torch.randn(2, 5, 4), torch.tensor([[True] * 5, [True, True, False, False, True]])
    tied, free = MultiDimensionalAttention(4, tied=True), MultiDimensionalAttention(4)
    found, _ = tied(h, mask)
    scores = tied.scores(h).squeeze(-1).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(found, (scores.softmax(-1).unsqueeze(-1) * h).sum(1))
    with torch.no_grad():
        free.scores[0].load_state_dict(tied.scores[0].state_dict())
        free.scores[2].weight.copy_(tied.scores[2].weight.expand(4, -1))
        free.scores[2].bias.copy_(tied.scores[2].bias.expand(4))
    torch.testing.assert_close(free(h, mask)[0], found)


def test_sources_of_a_token_are_weighed() -> None:
    layer = MultiRepresentationalAttention([3, 5], 4)
    sources = [torch.randn(2, 6, 3), torch.randn(2, 6, 5)]
    found, weights = layer(sources)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))
    mapped = [m(x) for m, x in zip(layer.maps, sources, strict=True)]
    torch.testing.assert_close(found, sum(weights[..., i : i + 1] * mapped[i] for i in range(2)))
    with pytest.raises(InputError, match="sources: expected 2"):
        layer(sources[:1])


@pytest.mark.parametrize("coarse", ["max", "mean", None])
def test_two_sequences_weigh_each_other(coarse: str | None) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 3), torch.randn(2, 5, 6)
    y_mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    layer = CoAttention(3, 6, coarse)
    found = layer(x, y, y_mask=y_mask)
    alone = layer(x[1:], y[1:, y_mask[1]])
    torch.testing.assert_close(found.x[1:, :1], alone.x[:, :1])
    torch.testing.assert_close(found.y[1:], alone.y)
    affinity = torch.tanh(x[0] @ layer.weight @ y[0].T)
    if coarse is None:
        torch.testing.assert_close(found.y_weights[0], affinity.softmax(-1))
    else:
        over = affinity.amax(1) if coarse == "max" else affinity.mean(1)
        torch.testing.assert_close(found.x_weights[0, 0], over.softmax(-1))


def test_no_method_is_without_a_record_and_records_can_be_searched() -> None:
    assert set(records()) == {m.name for m in cenote.methods()}
    assert {r.name for r in find_attention(positions="local", alignment="similarity")} == {"edscw", "idw", "adapool"}
    assert all("dot" in r.alignment for r in find_attention(alignment="dot"))
    with pytest.raises(InputError, match="colour: no axis"):
        find_attention(colour="blue")
