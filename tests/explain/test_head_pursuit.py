from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cenote.core import InputError
from cenote.explain import (
    ConceptHeads,
    Dictionary,
    SteeredHeads,
    concept_dictionary,
    concept_heads,
    head_outputs,
    lens,
    pursue,
    random_heads,
)
from cenote.models.live import AblatedHeads, edited, layers
from cenote.testing.as_found import AsFound
from tests import tiny
from tests.models.live import zoo

PADDED = {
    "input_ids": zoo.ids(3, 7),
    "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_of_one_sample_it_is_the_pursuit_of_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    h, d = drawn(1, 12, seed=seed), nn.functional.normalize(drawn(30, 12, seed=seed + 50), dim=1)
    theirs = sklearn.OrthogonalMatchingPursuit(n_nonzero_coefs=4, fit_intercept=False).fit(d.T.numpy(), h[0].numpy())
    found = pursue(h, d, 4, centre=False)
    assert set(found.atoms.tolist()) == set(theirs.coef_.nonzero()[0].tolist())


def test_one_step_of_one_sample_is_the_logit_lens() -> None:
    h, d = drawn(1, 12), drawn(30, 12, seed=1)
    found = pursue(h, d, 1, centre=False, unit=False)
    assert int(found.atoms[0]) == int(lens(h, d).abs().argmax())


def test_orthonormal_atoms_are_taken_by_their_projections() -> None:
    d = torch.linalg.qr(drawn(12, 12)).Q[:8]
    h = drawn(20, 12, seed=2)
    found = pursue(h, d, 5, centre=False)
    products = h @ d.T
    assert found.atoms.tolist() == products.abs().sum(0).argsort(descending=True)[:5].tolist()
    shares = products.square().sum(0)[found.atoms].cumsum(0) / h.square().sum()
    assert torch.allclose(found.explained, shares, atol=1e-5)


@pytest.mark.parametrize("criterion", ["l1", "l2", "linf"])
def test_explained_variance_never_falls_and_ends_at_one(criterion: str) -> None:
    h, d = drawn(20, 6), drawn(30, 6, seed=1)
    found = pursue(h, d, 6, criterion=criterion)
    assert bool((found.explained.diff() >= 0).all())
    assert found.score == pytest.approx(1.0, abs=1e-4)
    assert not found.exhausted


def test_scales_change_nothing() -> None:
    h, d = drawn(20, 6), drawn(30, 6, seed=1)
    first = pursue(h, d, 4)
    for other in (pursue(100 * h, d, 4), pursue(h, d * torch.rand(30, 1).add(0.1), 4), pursue(h + 3, d, 4)):
        assert torch.equal(first.atoms, other.atoms)
        assert torch.allclose(first.explained, other.explained, atol=1e-4)


def test_nothing_to_explain_and_too_few_atoms() -> None:
    flat = pursue(torch.full((5, 4), 0.3), drawn(6, 4), 3)
    assert (flat.score, flat.exhausted, len(flat.atoms)) == (0.0, True, 0)
    assert pursue(torch.zeros(5, 4), drawn(6, 4), centre=False).score == 0.0
    few = pursue(drawn(9, 4), drawn(2, 4, seed=3), 5)
    assert (len(few.atoms), few.exhausted) == (2, True)
    twice = pursue(drawn(9, 4), drawn(1, 4, seed=3).repeat(3, 1), 3)
    assert twice.explained.isfinite().all()


def test_planted_atoms_are_found_where_the_lens_sees_nothing() -> None:
    atoms = nn.functional.normalize(drawn(200, 64), dim=1)
    concept = Dictionary(atoms[:20], torch.arange(20), (), ())
    outputs = torch.zeros(1, 8, 300, 64)
    for head in range(8):
        chosen = atoms[:5] if head == 3 else atoms[20 + 20 * head : 25 + 20 * head]
        outputs[0, head] = drawn(300, 5, seed=head) @ chosen + 0.01 * drawn(300, 64, seed=90 + head)
    found = concept_heads(outputs, concept, 5, baseline=atoms)
    assert found.best(1) == [(0, 3)]
    assert sorted(found.atoms[0, 3].tolist()) == [0, 1, 2, 3, 4]
    assert found.explained[0, 3, -1] > 0.99


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_heads_and_bias_are_attentions_output(name: str) -> None:
    model = zoo.MODELS[name]("sdpa").model
    outputs = head_outputs(model, [PADDED])
    end = PADDED["attention_mask"].sum(1) - 1
    for number, layer in enumerate(layers(model, PADDED)):
        y = layer.heads.transpose(1, 2)[torch.arange(3), end]
        bias = layer.projection.bias if layer.projection.bias is not None else 0.0
        expected = layer.projection(y.flatten(1))
        assert torch.allclose(outputs[number].sum(0) + bias, expected, atol=1e-5)
    single = head_outputs(model, [{n: v[i : i + 1] for n, v in PADDED.items()} for i in range(3)])
    assert torch.allclose(outputs, single, atol=1e-5)


def test_language_decoder_of_a_vision_model() -> None:
    case = zoo.llava("sdpa")
    outputs = head_outputs(case.model, [case.inputs], stack="model.language_model.layers")
    assert outputs.shape == (3, 4, 2, 32)
    assert outputs.isfinite().all()
    with edited(case.model, SteeredHeads([(1, 2)], 0.0, 4, at=_text(case.model))):
        taken_out = head_outputs(case.model, [case.inputs], stack="model.language_model.layers")
    assert not taken_out[1, 2].any()


def _text(model: nn.Module):  # type: ignore[no-untyped-def]
    from cenote.models.live import one_stack

    return one_stack(model, "model.language_model.layers")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_factors(name: str) -> None:
    model = zoo.MODELS[name]("sdpa").model
    found = AsFound(model, lambda: model(**PADDED))
    with torch.no_grad():
        plain = model(**PADDED).logits
        with edited(model, SteeredHeads([(1, 2)], 1.0, 4)):
            assert torch.equal(model(**PADDED).logits, plain)
        with edited(model, SteeredHeads([(1, 2), (0, 1)], 0.0, 4)):
            steered = model(**PADDED).logits
        with edited(model, AblatedHeads([(1, 2), (0, 1)])):
            assert torch.equal(model(**PADDED).logits, steered)
    assert not found.changed()


def test_generated_tokens_alone() -> None:
    model = zoo.MODELS["llama"]("sdpa").model
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = PADDED["input_ids"][:1]
    seen: list[tuple[int, bool]] = []

    class Watching(SteeredHeads):
        def context(self, call, y):  # type: ignore[no-untyped-def]
            changed = super().context(call, y)
            seen.append((call.step, not torch.equal(changed, y)))
            return changed

    with edited(model, Watching([(1, 2)], -1.0, 4, generated_only=True)):
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert dict(seen) == {0: False, 1: True, 2: True, 3: True}


def test_concept_words(tmp_path: Path) -> None:
    tiny.words(tmp_path)
    letters = tiny.transformers().AutoTokenizer.from_pretrained(tmp_path)
    model = zoo.MODELS["gpt2"]("sdpa").model
    found = concept_dictionary(model, letters, ["a", "b c", "b", "a"])
    assert letters.convert_ids_to_tokens(found.tokens.tolist()) == ["a", "b"]
    assert (found.split, found.repeated) == (("b c",), ("b", "a"))
    every = concept_dictionary(model, letters, ["a", "b c"], pieces="all")
    assert letters.convert_ids_to_tokens(every.tokens.tolist()) == ["a", "b", "c"]
    assert torch.equal(every.rows, model.lm_head.weight[every.tokens])
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(2)
    folded = concept_dictionary(model, letters, ["a", "b c"], pieces="all", fold_norm=True)
    assert torch.allclose(folded.rows, 2 * every.rows)


def test_heads_of_a_concept_are_saved(tmp_path: Path) -> None:
    model = zoo.MODELS["gpt2"]("sdpa").model
    d = Dictionary(model.lm_head.weight[:4].detach(), torch.arange(4), (), ())
    found = concept_heads(head_outputs(model, [PADDED]), d, 2)
    assert len(found.best()) == 1
    found.save(tmp_path / "heads")
    again = ConceptHeads.load(tmp_path / "heads")
    assert torch.equal(again.scores, found.scores)
    assert again.best(5) == found.best(5)
    with pytest.raises(InputError, match="is not there"):
        ConceptHeads.load(tmp_path / "none")


def test_controls_are_of_the_same_layers() -> None:
    chosen = [(0, 1), (2, 0), (2, 3)]
    found = random_heads(chosen, 3, 5, seed=1)
    assert sorted(layer for layer, _ in found) == [0, 2, 2]
    assert not set(found) & set(chosen)
    assert found == random_heads(chosen, 3, 5, seed=1)
    assert len(set(random_heads(chosen, 3, 5, same_layers=False))) == 3


def test_quantised_weights_are_refused() -> None:
    model = copy.deepcopy(zoo.MODELS["llama"]("sdpa").model)
    packed = model.model.layers[0].self_attn.o_proj

    class Packed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.float().T

    made = Packed(32, 32, bias=False)
    made.weight = nn.Parameter(packed.weight.to(torch.int8), requires_grad=False)
    model.model.layers[0].self_attn.o_proj = made
    with pytest.raises(
        InputError, match="the output projection is a Packed, and its weights cannot be read as numbers"
    ):
        head_outputs(model, [PADDED])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pursue(drawn(3, 4), drawn(3, 5)), r"h, dictionary: expected \[samples, dim\]"),
        (lambda: pursue(drawn(3, 4), torch.zeros(3, 4)), "a row is zero"),
        (lambda: pursue(drawn(3, 4), drawn(3, 4), 0), "atoms: expected at least 1"),
        (lambda: pursue(drawn(3, 4), drawn(3, 4), criterion="l3"), "criterion: expected 'l1', 'l2' or 'linf'"),
        (lambda: SteeredHeads([(0, 7)], 0.0, 4), "heads: 7 of layer 0, and there are 4"),
        (lambda: SteeredHeads([], 0.0, 4), "heads: give at least one"),
        (lambda: random_heads([(0, 0), (0, 1)], 1, 3), "too many of layer 0"),
    ],
)
def test_what_cannot_be_used_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
