"""Maps of pairs of real embeddings sum to the cosine that the model itself gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from cenote.explain import DeepSimilarity
from cenote.models import load

pytestmark = pytest.mark.real("a sentence encoder of 23 million parameters, a vision transformer of 22 million")


def test_sentences_of_minilm(model_folder: Callable[[str], Path]) -> None:
    backbone = load(str(model_folder("minilm-l6-v2")))
    first = backbone.prepare(["A cat sleeps on the sofa.", "He repaired the bicycle."]).inputs
    second = backbone.prepare(["A kitten is resting on the couch.", "The bike was fixed by him."]).inputs
    explainer = DeepSimilarity(backbone.model)  # type: ignore[attr-defined]
    found = explainer.explain(first, second)
    states, others = (
        backbone.states(backbone.prepare(["He repaired the bicycle."])),
        backbone.states(backbone.prepare(["The bike was fixed by him."])),
    )
    expected = cosine_similarity(states.layers[6].mean(1), others.layers[6].mean(1))
    assert float(found.completeness_error.max()) < 1e-5
    assert torch.allclose(found.cosine[1:], expected, atol=1e-5)
    assert float(found.cosine.min()) > 0.5


def test_patches_of_dinov2(model_folder: Callable[[str], Path]) -> None:
    backbone = load(str(model_folder("dinov2-small")))
    images = torch.rand(2, 3, 28 * 4, 28 * 4, generator=torch.Generator().manual_seed(0))
    explainer = DeepSimilarity(backbone.model, prefix=1, grid=(8, 8))  # type: ignore[attr-defined]
    terms = explainer.terms({"pixel_values": images})
    found = explainer.explain(terms.item(0), terms.item(1))
    assert float(found.completeness_error.max()) < 1e-5
    assert torch.allclose(found.cosine, cosine_similarity(*terms.embedding.split(1)), atol=1e-5)
