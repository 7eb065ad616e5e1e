"""Heads as wide as one likes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cenote.core import InputError
from cenote.mix.rank_in_attention.layers import RankAttention
from cenote.mix.rank_in_attention.points import Kind, farthest_in_set, nearest_points, scaled_error
from cenote.mix.rank_in_attention.probe import CutRank, RankProbe, weight_spectrum
from cenote.mix.rank_in_attention.theory import (
    expected_error,
    head_gram,
    head_target,
    optimal_weights,
    vote_is_right,
)
from cenote.mix.rank_in_attention.transformer import (
    RankTransformer,
    UnitNorm,
    arms_of_equal_size,
    compare_arms,
    parameters_of,
    rank_at_equal_size,
    train_on_points,
)
from cenote.models.live import recorded
from tests import tiny


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


@pytest.mark.parametrize("kind", ["uniform", "orthogonal", "antipodal"])
def test_points_lie_on_the_sphere_and_targets_are_nearest(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, target = nearest_points(7, 6, 4, 3, kind, generator=generator)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(7, 4))
    assert torch.equal(target, RankAttention.exact(6).attend(x, y))
    if kind == "orthogonal":
        torch.testing.assert_close(x @ x.mT, torch.eye(4).expand(7, -1, -1))
    if kind == "antipodal":
        assert torch.equal(x[:, ::2], -x[:, 1::2])
    far = nearest_points(7, 6, 4, 3, kind, farthest=True, generator=generator)
    torch.testing.assert_close((far.target * far.y).sum(-1), (far.y @ far.x.mT).amin(-1))
    flat = nearest_points(7, 6, 4, 3, kind, plane=2, generator=generator)
    torch.testing.assert_close((flat.target * flat.y)[..., :2].sum(-1), (flat.y[..., :2] @ flat.x[..., :2].mT).amax(-1))
    own = farthest_in_set(2, 6, 4, kind, generator)
    torch.testing.assert_close((own.target * own.x).sum(-1), (own.x @ own.x.mT).amin(-1))


def test_errors_are_scaled_by_the_dimension_and_predictions_by_the_best_number() -> None:
    target = sphere(5, 3, 8)
    torch.testing.assert_close(scaled_error(target * 0, target), torch.tensor(1.0))
    assert scaled_error(target / 3, target) > 0.4
    assert scaled_error(target / 3, target, rescaled=True) < 1e-10
    with pytest.raises(InputError, match="points: at most 4"):
        nearest_points(1, 4, 5, kind="orthogonal")
    with pytest.raises(InputError, match="points: antipodal"):
        nearest_points(1, 4, 5, kind="antipodal")


def test_the_transformer_sums_modules_and_heads_must_divide_the_width() -> None:
    torch.manual_seed(0)
    x = sphere(2, 5, 8)
    model = RankTransformer(8, heads=2, layers=3, width_multiplier=4, inner=16)
    assert [len(m) for m in model.attention] == [4] * 3
    assert model.attend(x, sphere(2, 2, 8)).shape == (2, 2, 8)
    order = torch.randperm(5)
    torch.testing.assert_close(model(x[:, order]), model(x)[:, order], atol=1e-5, rtol=1e-5)
    for places in ("added", "appended"):
        placed = RankTransformer(8, heads=2, inner=16, places=places)
        assert placed(x).shape == (2, 5, 8)
        assert not torch.allclose(placed(x[:, order]), placed(x)[:, order], atol=1e-3)
    with pytest.raises(InputError, match="x: 17 tokens, and this model has 16 positions"):
        placed(sphere(1, 17, 8))
    with pytest.raises(InputError, match="heads: 3 does not divide the width 8"):
        RankTransformer(8, heads=3)
    torch.testing.assert_close(UnitNorm()(3 * x), x)


def test_training_lowers_the_error_of_arms_of_equal_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for heads in (1, 2):
        torch.manual_seed(0)
        layer = RankAttention(4, rank_at_equal_size(4, heads, (1, 4)), heads)
        losses = train_on_points(layer, lambda _: nearest_points(64, 4, 3, generator=generator), 60, lr=0.05)
        assert losses[-1] < 0.7 * losses[0]
        assert parameters_of(4, layer.rank, heads) == sum(p.numel() for p in layer.parameters())
    with pytest.raises(InputError, match="heads: 9"):
        rank_at_equal_size(8, 9, (1, 8))


def test_arms_of_equal_size_are_compared_on_new_points() -> None:
    arms = arms_of_equal_size(8, parameters_of(8, 8, 1) + 100)
    assert all(parameters_of(8, rank, heads) <= parameters_of(8, 8, 1) + 100 for heads, rank in arms)
    found = compare_arms([(1, 4), (2, 1)], 4, 3, steps=15, lr=0.05, batch=32, seeds=(0, 1))
    assert {len(errors) for errors in found.values()} == {2}
    assert found == compare_arms([(1, 4), (2, 1)], 4, 3, steps=15, lr=0.05, batch=32, seeds=(0, 1))


def test_spectra_of_weights_are_those_of_the_products() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(12, 10), torch.randn(6, 10)
    found = weight_spectrum(query, key, heads=4)
    for h in range(4):
        product = query.view(4, 3, 10)[h].T @ key.view(2, 3, 10)[h // 2]
        torch.testing.assert_close(found[h], torch.linalg.svdvals(product.double())[:3])
    with pytest.raises(InputError, match="heads: 5"):
        weight_spectrum(query, key, 5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_a_probe_does_not_see_padding(kind: str, attention: str) -> None:
    library = tiny.transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(library, f"{kind}Config")(
        vocab_size=20, intermediate_size=16, attn_implementation=attention, **sizes
    )
    model = getattr(library, f"{kind}Model")(config).eval()
    ids = torch.randint(1, 20, (2, 9))
    plain = RankProbe(model, {"input_ids": ids})
    wide = torch.cat([torch.full((2, 7), 3), ids, torch.full((2, 4), 5)], 1)
    mask = torch.zeros_like(wide)
    mask[:, 7:16] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = RankProbe(model, {"input_ids": wide, "attention_mask": mask, "position_ids": places})
    for block, scores in plain.heads.items():
        torch.testing.assert_close(padded.heads[block].spectrum, scores.spectrum, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=f"model: {kind}Model gives no logits"):
        plain.needed()


def test_a_model_is_cut_to_the_rank_that_it_needs() -> None:
    library = tiny.transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = library.LlamaConfig(vocab_size=20, intermediate_size=16, **sizes)
    model = library.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    inputs = {"input_ids": torch.randint(0, 20, (2, 30))}
    before = model(**inputs).logits
    probe = RankProbe(model, inputs)
    found = probe.needed((1, 2, 4))
    assert found.losses[4] == pytest.approx(found.whole, rel=1e-4)
    assert abs(found.losses[1] - found.whole) > abs(found.losses[4] - found.whole)
    assert found.needed in (1, 2, 4)
    assert probe.needed((1,), heads=[(1, 2)]).losses[1] != found.losses[1]
    assert torch.equal(model(**inputs).logits, before)
    assert all(bool((r >= 1).all()) and bool((r <= 4).all()) for r in probe.effective_ranks().values())
    with recorded(model, "inputs") as seen:
        model(**inputs)
    call = next(iter(seen["inputs"].values()))[0]
    q, k = (t.transpose(0, 1).flatten(1, 2).double() for t in (call.q, call.k.repeat_interleave(2, 1)))
    for rank in (1, 3):
        # no map of this rank is nearer to the scores of all pairs that were seen
        best = torch.linalg.svdvals(q @ k.mT)[:, rank:].square().sum(-1)
        cut = q @ CutRank(probe.heads, rank).maps[0] @ k.mT
        torch.testing.assert_close((q @ k.mT - cut).square().sum((1, 2)), best, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="heads: none of"):
        CutRank(probe.heads, 1, [(7, 0)])
