from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import (
    EncoderLayer,
    GlobEnc,
    contributions,
    fixed_residual,
    head_norms,
    measured_residual,
    mixing_ratio,
    product,
    quadratic,
)
from cenote.models.live import frozen, layers, of_heads
from cenote.testing import check_explainer
from tests.models.live import zoo

VARIANTS = ("n", "n_res", "n_resln", "n_enc")
PADDED = {
    "input_ids": zoo.ids(3, 7),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
}
UNEVEN = {"initializer_range": 0.5}
ENCODERS = ("BertModel", "RobertaModel", "ElectraModel", "DistilBertModel")


def encoder(cls: str = "BertModel", attention: str = "sdpa") -> nn.Module:
    settings = {"embedding_size": 32} if cls == "ElectraModel" else {}
    if cls == "DistilBertModel":
        settings = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
    model = zoo.text(cls, **UNEVEN, **settings)(attention).model
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


@torch.no_grad()
def ran(model: nn.Module) -> list[tuple[EncoderLayer, Tensor]]:
    found = []
    for layer in layers(model, PADDED):
        maps = of_heads(layer.projection, layer.call.heads)
        norms = [frozen(*norm) for norm in layer.norms]
        found.append((EncoderLayer(layer.read, layer.call.v, maps, *norms), layer.call.weights()))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gram_form_is_the_dense_one(variant: str) -> None:
    for parts, weights in ran(encoder()):
        dense = contributions(parts, weights, variant).norm(dim=-1)
        for block in (2, 32):
            found = quadratic(parts, variant, block).rows(weights).float()
            torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
        rows = quadratic(parts, variant).rows(weights[:, :, 2:5], 2).float()
        torch.testing.assert_close(rows, dense[:, 2:5], rtol=1e-5, atol=1e-5)


def test_contributions_sum_to_the_true_states() -> None:
    with torch.no_grad():
        for layer, (parts, weights) in zip(layers(model := encoder(), PADDED), ran(model), strict=True):
            first, second = parts.first, parts.second
            assert first is not None
            assert second is not None
            b = layer.projection.bias.detach().double()
            n = contributions(parts, weights, "n_resln").sum(2)
            rest = first.mapped(b) / first.deviation[..., None] + first.bias
            assert torch.allclose(n + rest, layer.norms[0].wrote.double(), atol=1e-5)
            e = contributions(parts, weights, "n_enc").sum(2)
            linear = second.mapped(n.double()) / second.deviation[..., None]
            assert torch.allclose(e.double(), linear, atol=1e-5)


def test_heads_are_summed_before_their_norm_is_taken() -> None:
    parts, weights = ran(encoder())[0]
    by_head = [
        contributions(
            EncoderLayer(parts.x, parts.values[:, h : h + 1], parts.maps[h : h + 1]), weights[:, h : h + 1], "n"
        )
        for h in range(4)
    ]
    assert torch.allclose(torch.stack(by_head).sum(0), contributions(parts, weights, "n"), atol=1e-5)
    expected = torch.stack([u.norm(dim=-1) for u in by_head], 1)
    assert torch.allclose(head_norms(parts, weights), expected, atol=1e-5)


def layer(tokens: int = 5, equal: bool = False) -> EncoderLayer:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1 if equal else tokens, 8, generator=generator).expand(1, tokens, 8)
    values = torch.randn(1, 2, 1 if equal else tokens, 4, generator=generator).expand(1, 2, tokens, 4)
    return EncoderLayer(x, values, torch.randn(2, 4, 8, generator=generator))


def test_equal_tokens_attended_evenly_give_equal_norms() -> None:
    found = quadratic(layer(equal=True), "n_res").rows(torch.full((1, 2, 5, 5), 0.2))[0]
    others = found[~torch.eye(5, dtype=torch.bool)]
    assert torch.allclose(others, others[0].expand(20))


def test_without_an_output_projection_the_residual_is_left() -> None:
    parts = layer()._replace(maps=torch.zeros(2, 4, 8))
    found = quadratic(parts, "n_res").rows(torch.rand(1, 2, 5, 5)).float()
    assert torch.allclose(found, torch.diag_embed(parts.x.norm(dim=-1)), atol=1e-6)


def test_products_add_nothing_and_rescaling_keeps_ranks() -> None:
    matrices = 30 * torch.rand(2, 3, 4, 4)
    plain = product(matrices)
    assert torch.equal(plain, matrices[:, 2] @ (matrices[:, 1] @ matrices[:, 0]))
    scaled = product(matrices, rescale=True)
    ratio = plain / scaled
    assert torch.allclose(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-4)
    assert product(1e30 * matrices, rescale=True).isfinite().all()


def test_rivals_have_rows_that_sum_to_one() -> None:
    a, ratio = torch.rand(2, 4, 4), torch.tensor([[0.1, 0.5, 0.9, 1.0]] * 2)
    w_res = measured_residual(a, ratio)
    assert torch.allclose(w_res.sum(-1), torch.ones(2, 4))
    assert torch.allclose(w_res.diagonal(dim1=1, dim2=2), 1 - ratio)
    half = fixed_residual(7 * a)
    assert torch.allclose(half.sum(-1), torch.ones(2, 4))
    assert torch.allclose(half - 0.5 * torch.eye(4), 0.5 * a / a.sum(-1, keepdim=True))


def test_mixing_ratio_is_that_of_the_vectors() -> None:
    parts, weights = ran(encoder())[1]
    e = contributions(parts, weights, "n_enc")
    own = e.diagonal(dim1=1, dim2=2).mT
    mixing, preserving = (e.sum(2) - own).norm(dim=-1), own.norm(dim=-1)
    assert torch.allclose(mixing_ratio(parts, weights, "n_enc"), mixing / (mixing + preserving), atol=1e-5)


@pytest.mark.parametrize("cls", ENCODERS)
def test_keeps_the_contract(cls: str) -> None:
    check_explainer(GlobEnc(), encoder(cls), PADDED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_and_pre_norms_keep_the_contract(variant: str) -> None:
    check_explainer(GlobEnc(variant), encoder(), PADDED)


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chained_row_is_a_row_of_the_product(variant: str, block: int) -> None:
    model = encoder()
    whole = product(GlobEnc().matrices(model, PADDED)[variant])
    for query, at in ("first", torch.zeros(3, dtype=torch.long)), ("last", PADDED["attention_mask"].sum(1) - 1):
        row = whole[torch.arange(3), at]
        scores = GlobEnc(variant, query, block=block).explain(model, PADDED).scores
        torch.testing.assert_close(scores, row / row.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_padding_gives_and_gets_nothing() -> None:
    found = GlobEnc().matrices(model := encoder(), PADDED)
    for name in ("w", *VARIANTS):
        assert not found[name][1, :, 4:].any()
        assert not found[name][1, :, :, 4:].any()
        alone = {n: v[1:2, :4] for n, v in PADDED.items()}
        single = GlobEnc().matrices(model, alone)[name][0]
        assert torch.allclose(found[name][1, :, :4, :4], single, rtol=1e-5, atol=1e-5)


def test_one_token() -> None:
    model = encoder()
    assert GlobEnc().matrices(model, {"input_ids": zoo.ids(2, 1)})["n_enc"].shape == (2, 3, 1, 1)
    assert torch.equal(GlobEnc().explain(model, {"input_ids": zoo.ids(2, 1)}).scores, torch.ones(2, 1))


def test_the_attention_that_was_loaded_makes_no_difference() -> None:
    sdpa, eager = (GlobEnc().explain(encoder(attention=a), PADDED).scores for a in ("sdpa", "eager"))
    assert torch.allclose(sdpa, eager, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: zoo.text("LlamaForCausalLM")("sdpa").model, "reads backwards only; GlobEnc is of encoders"),
        (lambda: zoo.text("BertLMHeadModel", is_decoder=True)("sdpa").model, "reads backwards only"),
        (lambda: nn.Linear(3, 3), "found no attention in Linear; expected a transformer"),
    ],
)
def test_other_models_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GlobEnc().explain(build(), {"input_ids": zoo.ids()})


def test_pre_norms_need_a_word() -> None:
    case = zoo.vision("ViTModel")("sdpa")
    with pytest.raises(InputError, match=r"do not stand behind its sums.*pre_norm=True"):
        GlobEnc().explain(case.model, case.inputs)
    found = GlobEnc(pre_norm=True).explain(case.model, case.inputs)
    assert torch.allclose(found.scores.sum(1), torch.ones(2))
    assert set(GlobEnc(pre_norm=True).matrices(case.model, case.inputs)) == {
        "w", "head_n", "n", "ratio_n", "n_res", "ratio_n_res",
    }  # fmt: skip


def test_a_norm_behind_another_is_not_taken_for_one() -> None:
    model = encoder()
    other = copy.deepcopy(model)
    other.encoder.layer[1].output.LayerNorm = nn.Sequential(nn.LayerNorm(32), nn.Tanh())
    with pytest.raises(InputError, match="do not stand behind its sums"):
        GlobEnc().explain(other, PADDED)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GlobEnc("n_ffn"), "variant: expected 'n', 'n_res', 'n_resln' or 'n_enc'"),
        (lambda: GlobEnc(query="middle"), "query: expected 'first' or 'last'"),
        (lambda: GlobEnc(block=0), "block: expected at least 1"),
        (lambda: quadratic(layer(), "n_enc"), "'n_enc' takes in norms behind the sums, and this layer has none"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
