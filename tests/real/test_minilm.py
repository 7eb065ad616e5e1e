"""all-MiniLM-L6-v2 through our adapter: the pooled states of a sentence are what it means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cenote import create
from cenote.models import Backbone, load

pytestmark = pytest.mark.real("a sentence encoder of 23 million parameters")

PAIRS = (
    ("A cat sleeps on the sofa.", "A kitten is resting on the couch."),
    ("The tax return is due in May.", "You must file your taxes before summer."),
    ("He repaired the bicycle.", "The bike was fixed by him."),
    ("It rained all night in the village.", "The whole night there was rain over the hamlet."),
)


@pytest.fixture(scope="module")
def backbone(model_folder: Callable[[str], Path]) -> Backbone:
    return load(str(model_folder("minilm-l6-v2")))


def embedded(backbone: Backbone, texts: list[str]) -> Tensor:
    states = backbone(texts)
    return normalize(create("mean-all", dim=384)(states.layers[6], states.mask))


def test_sentences_that_mean_the_same_lie_close(backbone: Backbone) -> None:
    assert (backbone.layout.blocks, backbone.layout.dims[6], backbone.layout.prefix_tokens) == (6, 384, 1)
    first, second = (embedded(backbone, list(side)) for side in zip(*PAIRS, strict=True))
    similarity = first @ second.T
    assert similarity.diagonal().min() > 0.5
    assert similarity[~torch.eye(len(PAIRS), dtype=torch.bool)].max() < 0.3


def test_embeddings_are_those_of_sentence_transformers(backbone: Backbone, model_folder: Callable[[str], Path]) -> None:
    library = pytest.importorskip("sentence_transformers", reason="cenote[sentence-transformers] is not installed")
    texts = [text for pair in PAIRS for text in pair]
    model = library.SentenceTransformer(str(model_folder("minilm-l6-v2")), device="cpu")
    expected = model.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(embedded(backbone, texts), expected, rtol=0, atol=1e-5)


def test_states_are_those_of_the_library(minilm: Any, backbone: Backbone) -> None:
    model, tokenizer = minilm
    texts = [text for pair in PAIRS for text in pair]
    with torch.no_grad():
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt"), output_hidden_states=True).hidden_states
    found = backbone(texts, range(7))
    for layer in range(7):
        torch.testing.assert_close(found.layers[layer], expected[layer])
