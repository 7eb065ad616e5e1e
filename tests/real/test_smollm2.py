"""SmolLM2-135M-Instruct: what it can do, and what stands in its states and attentions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.models import Backbone, Prepared, load

pytestmark = pytest.mark.real("a language model of 135 million parameters")

TEXT = (
    "The river begins in the mountains, where snow melts in spring and small streams run together. It flows through a wide "
    "valley with farms on both sides, passes under an old stone bridge, and reaches the sea near a fishing village. In summer "
    "children swim in it, and in winter the water is high and brown. People have lived on its banks for thousands of years."
)
CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna, Poland Warsaw, "
    "Hungary Budapest, Russia Moscow, Ukraine Kyiv, Sweden Stockholm, Norway Oslo, Denmark Copenhagen, Finland Helsinki, "
    "Ireland Dublin, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Iraq Baghdad, Iran Tehran, China Beijing, Japan Tokyo, "
    "Thailand Bangkok, Vietnam Hanoi, Cuba Havana, Peru Lima, Chile Santiago, Canada Ottawa, Morocco Rabat"
)
HALF = 64


@pytest.fixture(scope="module")
def backbone(model_folder: Callable[[str], Path]) -> Backbone:
    return load(str(model_folder("smollm2-135m-instruct")))


@pytest.fixture(scope="module")
def repeated() -> Tensor:
    """Random tokens, said twice."""
    half = torch.randint(1000, 40000, (4, HALF), generator=torch.Generator().manual_seed(0))
    return torch.cat([half, half], 1)


def prepared(ids: Tensor) -> Prepared:
    return Prepared({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@torch.no_grad()
def perplexity(smollm2: Any, text: str) -> float:
    model, tokenizer = smollm2
    ids = tokenizer(text, return_tensors="pt").input_ids
    return math.exp(model(input_ids=ids, labels=ids).loss)


def test_plain_text_is_likely_and_its_words_shuffled_are_not(smollm2: Any) -> None:
    words = TEXT.split()
    random.Random(0).shuffle(words)
    plain = perplexity(smollm2, TEXT)
    assert 10 < plain < 40
    assert perplexity(smollm2, " ".join(words)) > 10 * plain


@torch.no_grad()
def test_knows_capitals(smollm2: Any) -> None:
    model, tokenizer = smollm2
    ranks = []
    for country, capital in (pair.split() for pair in CAPITALS.split(", ")):
        prompt = tokenizer(f"The capital city of {country} is the city of", return_tensors="pt")
        logits = model(**prompt).logits[0, -1]
        ranks.append(int((logits > logits[tokenizer(f" {capital}").input_ids[0]]).sum()))
    assert len(ranks) == 30
    assert sum(rank == 0 for rank in ranks) >= 20
    assert sum(rank < 5 for rank in ranks) >= 28


@torch.no_grad()
def test_copies_what_was_said_before(smollm2: Any, repeated: Tensor) -> None:
    log_probabilities = smollm2.model(repeated).logits[:, :-1].log_softmax(-1)
    losses = -log_probabilities.gather(-1, repeated[:, 1:, None])[..., 0]
    assert losses[:, : HALF - 1].mean() > 12
    assert losses[:, HALF:].mean() < 4


def test_heads_that_look_where_the_token_was_followed(backbone: Backbone, repeated: Tensor) -> None:
    attentions = backbone.states(prepared(repeated), attentions=True).attentions
    assert attentions is not None
    at = torch.arange(HALF, 2 * HALF - 1)
    scores = torch.stack([a[:, :, at, at - HALF + 1].mean((0, 2)) for a in attentions])
    best = {divmod(int(i), scores.shape[1]) for i in scores.flatten().topk(6).indices}
    assert scores[18, 6] > 0.8
    assert {(18, 6), (17, 3), (17, 4), (18, 7)} < best


def test_the_first_token_is_a_sink_and_a_giant(backbone: Backbone, repeated: Tensor) -> None:
    """Without a token of its own in front, the first word takes the attention that no word wants: leave it out of means."""
    found = backbone.states(prepared(repeated), range(31), attentions=True)
    assert found.attentions is not None
    sink = torch.stack([a[:, :, 1:, 0].mean() for a in found.attentions])
    assert sink[3:10].min() > 0.5
    assert torch.cat([sink[:2], sink[11:12]]).max() < 0.1
    for layer in range(12, 29):
        norms = found.layers[layer].norm(dim=-1)
        assert norms[:, 0].min() > 30 * norms[:, 1:].median()
    assert found.layers[15].norm(dim=-1)[:, 0].min() > 10_000


def test_states_are_those_of_the_library_also_beside_longer_texts(smollm2: Any, backbone: Backbone) -> None:
    model, tokenizer = smollm2
    short = "A cenote is a natural pool."
    assert (backbone.layout.blocks, backbone.layout.dims[30], backbone.layout.prefix_tokens) == (30, 576, 0)
    with torch.no_grad():
        expected = model(**tokenizer(short, return_tensors="pt"), output_hidden_states=True).hidden_states
    layers = (0, 11, 15, 30)
    alone, together = backbone([short], layers), backbone([short, TEXT], layers)
    assert together.mask is not None
    real = together.mask[0]
    for layer in layers:
        torch.testing.assert_close(alone.layers[layer], expected[layer], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(together.layers[layer][0, real], expected[layer][0], rtol=1e-3, atol=1e-2)
