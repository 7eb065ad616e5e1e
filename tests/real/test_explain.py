"""Explanations of real models: logits as sums, continuations, heads by what they do, norms of an encoder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.core.language import log_probabilities
from cenote.explain import (
    EncoderLayer,
    GlobEnc,
    HeadScores,
    contributions,
    facts,
    head_atlas,
    logit_parts,
    norms,
    product,
    prompted,
    repeated,
)
from cenote.models.live import AblatedHeads, edited, frozen, layers, of_heads

pytestmark = pytest.mark.real("a language model of 135 million parameters and a sentence encoder")

WORDS = (1000, 40000)
PERIOD = 64


@pytest.fixture(scope="module")
def atlas(smollm2: Any) -> dict[str, HeadScores]:
    return head_atlas(smollm2.model, WORDS)


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Of what was said before."""
    logs = model(ids).logits[:, :-1].log_softmax(-1)
    return float(-logs.gather(-1, ids[:, 1:, None])[:, PERIOD:].mean())


def test_induction_heads_of_a_real_decoder(atlas: dict[str, HeadScores]) -> None:
    found = atlas["induction"]
    best = found.heads()
    assert (best[0].layer, best[0].head) == (18, 6)
    assert best[0].score > 0.8
    assert found.scores[17, 3] > 0.6
    assert len([one for one in best if one.score > 0.3]) >= 10
    assert all(found.errors[one.layer, one.head] > 5 for one in best)
    assert found.control.max() < 0.1


def test_other_heads_of_a_real_decoder(atlas: dict[str, HeadScores]) -> None:
    previous = {(one.layer, one.head) for one in atlas["previous token"].heads(0.6)}
    assert {(16, 0), (11, 1), (2, 1), (19, 3), (1, 2)} <= previous
    assert atlas["duplicate token"].heads(0.5)
    assert len(atlas["sink"].heads(0.5)) > 50


def test_no_head_is_found_where_weights_are_random(smollm2: Any) -> None:
    other, generator = copy.deepcopy(smollm2.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            if p.dim() > 1:
                p.copy_(p.std() * torch.randn(p.shape, generator=generator))
    assert not any(found.heads() for found in head_atlas(other, WORDS).values())


def test_without_induction_heads_nothing_is_repeated(smollm2: Any, atlas: dict[str, HeadScores]) -> None:
    ids = repeated(8, PERIOD, WORDS, spread=0).ids
    top = [(one.layer, one.head) for one in atlas["induction"].heads()[:10]]
    assert loss(smollm2.model, ids) < 3.5
    with edited(smollm2.model, AblatedHeads(top)):
        ablated = loss(smollm2.model, ids)
    assert ablated > 11
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        drawn = [divmod(int(i), 9) for i in torch.randperm(270, generator=generator)]
        with edited(smollm2.model, AblatedHeads([at for at in drawn if at not in top][:10])):
            assert loss(smollm2.model, ids) < ablated - 1


def test_logits_of_facts_are_sums_of_their_parts(smollm2: Any) -> None:
    model, tokenizer = smollm2
    known = [fact for fact in facts() if fact.relation == "capital"]
    chosen = known[:6]
    asked = prompted(tokenizer, chosen, known)
    found = logit_parts(model, asked.inputs, asked.targets)
    end = asked.spans["end"]
    with torch.no_grad():
        logits = model(**asked.inputs).logits[end].gather(1, asked.targets)
    off = (found.parts.values.sum(1) - logits).abs().max() / logits.abs().max()
    assert off <= 1e-4
    assert found.parts.relative_residual <= 1e-4
    assert (found.sources.sum(3) - found.heads).abs().max() <= 1e-5 * found.heads.abs().max()
    best = found.parts.total.argmax(1)
    assert (best == asked.answer).sum() >= 5
    # memory knows the targets, not the vocabulary
    assert found.sources.shape == (6, 30, 9, end.shape[1], len(asked.candidates))


def test_continuations_are_scored_as_whole_strings(smollm2: Any) -> None:
    model, tokenizer = smollm2
    prompt, choices = (
        "The capital of France is",
        [" Paris", " Berlin", " the city of light", " Antananarivo, of course"],
    )
    found = log_probabilities(model, tokenizer, prompt, choices)
    for total, choice in zip(found.total.tolist(), choices, strict=True):
        ids, before = (tokenizer(text, return_tensors="pt").input_ids[0] for text in (prompt + choice, prompt))
        with torch.no_grad():
            logs = model(ids[None]).logits[0].log_softmax(-1)
        expected = sum(float(logs[i - 1, ids[i]]) for i in range(len(before), len(ids)))
        assert total == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match=r"question 4: .* merge into the token"):
        log_probabilities(model, tokenizer, "The capital of France is Par", ["is"], item="question 4")


def test_continuations_are_scored_as_by_the_evaluation_harness(smollm2: Any) -> None:
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    instances = pytest.importorskip("lm_eval.api.instance")
    model, tokenizer = smollm2
    harness = models.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
    prompt, choices = "Is water wet? ", ["yes", "no, never"]
    requests = [instances.Instance("loglikelihood", {}, (prompt, choice), i) for i, choice in enumerate(choices)]
    expected = [total for total, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    assert log_probabilities(model, tokenizer, prompt, choices).total.tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_norms_of_a_real_encoder(minilm: Any) -> None:
    model, tokenizer = minilm
    inputs = dict(tokenizer(["The plot is thin but the cast is lovely.", "Dull."], padding=True, return_tensors="pt"))
    for layer in layers(model, inputs):
        maps, weights = of_heads(layer.projection, layer.call.heads), layer.call.weights()
        parts = EncoderLayer(layer.read, layer.call.v, maps, *(frozen(*norm) for norm in layer.norms))
        dense = contributions(parts, weights).norm(dim=-1)
        torch.testing.assert_close(norms(parts, weights), dense, rtol=1e-5, atol=1e-5)
    row = product(GlobEnc().matrices(model, inputs)["n_enc"])[:, 0]
    scores = GlobEnc().explain(model, inputs).scores
    torch.testing.assert_close(scores, row / row.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
