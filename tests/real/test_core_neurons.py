"""Core neurons of a real language model, sensitive tokens of a real vision transformer, and how few of its tokens will do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from cenote.compare.ranking import spearman
from cenote.jobs.reduce import compare_encoder
from cenote.models.live import SlicedNeurons, edited, feed_forwards
from cenote.reduce import CoreMatching, ZOOPrune, exact_sensitivity, sensitivity

pytestmark = pytest.mark.real("models of 22 to 135 million parameters")

TEXT = (
    "The water cycle describes how water moves on, above, and below the surface of the Earth. The sun heats the sea, water "
    "rises as vapour, cools, and falls as rain or snow. Some of it runs into rivers and back to the sea, and some of it sinks "
    "into the ground, where it is stored in rock for many years before it comes out again in a spring."
)
PROMPT = 40


def loss(model: Any, ids: Tensor, *edits: Any) -> float:
    """Mean loss of the text behind the prompt, decoded in one piece."""
    with torch.no_grad(), edited(model, *edits) if edits else torch.no_grad():
        first = model(ids[:, :PROMPT], use_cache=True)
        cache = first.get("cache") or first["past_key_values"]
        rest = model(ids[:, PROMPT:], past_key_values=cache).logits
    logits = torch.cat([first.logits[:, -1:], rest[:, :-1]], 1)
    return float(nn.functional.cross_entropy(logits[0], ids[0, PROMPT:]))


def test_decoding_with_the_core_is_nearer_to_the_model_than_with_random_neurons(smollm2: Any) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids

    def drawn(activations: Tensor, real: Tensor, block: int) -> Tensor:
        count = activations.shape[-1]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(block))
        return (torch.zeros(count).index_fill(0, order[: int(0.6 * count)], 1.0) > 0).expand(len(real), -1)

    everything = SlicedNeurons(lambda a, real, block: torch.ones(len(a), a.shape[-1], dtype=torch.bool))
    dense = loss(model, ids)
    assert loss(model, ids, everything) == pytest.approx(dense, abs=1e-5)
    core = loss(model, ids, CoreMatching(None, neurons=range(5, 26), share=0.6))
    assert dense < core < loss(model, ids, SlicedNeurons(drawn)) - 0.5


def test_a_real_feed_forward_part_is_found_and_tokens_of_a_span_go(smollm2: Any) -> None:
    model, tokenizer = smollm2
    assert {(f.dim, f.neurons, f.gated) for f in feed_forwards(model).values()} == {(576, 1536, True)}
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    span = torch.zeros_like(ids, dtype=torch.bool)
    span[:, 4:60] = True
    core = CoreMatching(2, span)
    with torch.no_grad(), edited(model, core):
        model(ids)
    assert 0 < int(core.kept[2][span].sum()) < 56
    assert core.shortened.counts == {2: (ids.shape[1], int(core.kept[2].sum()))}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Digits at 84 pixels, and which they are."""
    found = load_digits()
    images = torch.from_numpy(found.images[:150]).float()[:, None].expand(-1, 3, -1, -1) / 16
    return nn.functional.interpolate(images, (84, 84), mode="bicubic"), torch.from_numpy(found.target[:150])


def test_sensitivities_of_real_patches_follow_the_jacobian(dinov2: Any, digits: tuple[Tensor, Tensor]) -> None:
    model, _ = dinov2
    with torch.no_grad():
        states = model(digits[0][:2], output_hidden_states=True).hidden_states[10][:, 1:]
    torch.manual_seed(0)
    project = nn.Sequential(nn.Linear(384, 192), nn.GELU(), nn.Linear(192, 64))
    found, exact = sensitivity(project, states), exact_sensitivity(project, states)
    for one, other in zip(found, exact, strict=True):
        assert spearman(one.numpy(), other.numpy()) > 0.8
    reduced = ZOOPrune(project, tokens=9)(states)
    assert reduced.tokens.shape == (2, 9, 384)
    with torch.no_grad():
        z = nn.functional.normalize(project(states), dim=-1)
        kept = nn.functional.normalize(project(reduced.tokens), dim=-1)
    # what is kept differs more than patches do
    assert float((kept @ kept.mT).mean()) < float((z @ z.mT).mean())


def test_how_few_patches_a_real_encoder_needs(dinov2: Any, digits: tuple[Tensor, Tensor]) -> None:
    model, _ = dinov2
    images, labels = digits
    settings: dict[str, Any] = {"blocks": [5], "state": 10, "seeds": 1, "batch": 50}
    found = compare_encoder(model, images, labels, ["top-attention"], (4.0,), **settings)
    whole, some = found["unreduced"], found["top-attention x4 behind block 5"]
    assert whole.metric > 0.6
    assert whole.tokens == (37,) * 10
    assert some.tokens == (*(37,) * 6, *(10,) * 4)
    assert some.multiply_adds < 0.75 * whole.multiply_adds
    assert 0 < some.agreement <= 1
