"""Text models as encoders of late interaction, on a small one with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from cenote.core import InputError
from cenote.features.corpora import Corpus, Texts
from cenote.jobs.index import index, search
from cenote.jobs.index.job import meta_for
from cenote.jobs.reduce import Asked, compare_corpus
from cenote.models import load
from cenote.models.token_vectors import TokenEncoder

TEXTS = ["a b c d", "c a f", "b", "d e a f b e e f a c e b d"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer knows a full stop and a comma."""
    folder = tiny.bert(tmp_path_factory.mktemp("bert"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {".": 31, ",": 32}
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TokenEncoder:
    return TokenEncoder(load(str(folder), "text"))


def test_vectors_are_the_models_states_of_norm_one(encoder: TokenEncoder) -> None:
    found = encoder.documents(TEXTS)
    assert found.lengths().tolist() == [6, 5, 3, 15]
    assert (encoder.width, encoder.protect) == (32, 1)
    for text, vectors in zip(TEXTS, found, strict=True):
        states = encoder.backbone([text]).layers[3][0]
        torch.testing.assert_close(vectors, torch.nn.functional.normalize(states, dim=1), atol=1e-5, rtol=1e-4)


def test_punctuation_is_left_out_of_documents_alone(encoder: TokenEncoder, folder: Path) -> None:
    text = "a , b . c"
    assert encoder.documents([text]).lengths().tolist() == [5]
    assert encoder.queries([text]).lengths().tolist() == [7]
    assert encoder.words(text) == ["[CLS]", "a", "b", "c", "[SEP]"]
    kept = TokenEncoder(load(str(folder), "text"), punctuation=True)
    torch.testing.assert_close(kept.documents([text]).values, encoder.queries([text]).values)
    torch.testing.assert_close(
        encoder.documents([text]).values, kept.documents([text]).values[torch.tensor([0, 1, 3, 5, 6])]
    )


def test_another_layer(folder: Path, encoder: TokenEncoder) -> None:
    backbone = load(str(folder), "text")
    first = TokenEncoder(backbone, layer=1)
    assert first.layer == TokenEncoder(backbone, layer=-3).layer == 1
    states = backbone([TEXTS[0]], (1,)).layers[1][0]
    torch.testing.assert_close(first.documents(TEXTS[:1]).values, torch.nn.functional.normalize(states, dim=1))
    with pytest.raises(InputError, match="has hidden states 0 to 3, got 4"):
        TokenEncoder(backbone, layer=4)
    with pytest.raises(InputError, match="takes image; name a text model"):
        TokenEncoder(load(str(tiny.vit(folder.parent / "vit"))))


def test_from_texts_to_a_verdict_and_to_a_store(encoder: TokenEncoder, tmp_path: Path) -> None:
    from cenote.features.vectors import ExactStore

    texts = Texts(tuple("wxyz"), tuple(TEXTS))
    corpus = Corpus("tiny", "by hand", texts, Texts(("q1", "q2"), ("a b", "c f")), ({0: 1.0}, {1: 1.0}))
    found = compare_corpus(corpus, encoder, Asked(["sequential"], factors=(2,), seeds=1), out=tmp_path / "out")
    assert (found.dataset["vectors"], found["sequential x2"].vectors) == (29, 4 + 3 + 2 + 8)
    calls: list[Any] = []
    encode = encoder.documents
    encoder.documents = lambda given: calls.append(given) or encode(given)  # type: ignore[method-assign,func-returns-value]
    try:
        compare_corpus(corpus, encoder, Asked(["sequential"], factors=(3,), seeds=1), out=tmp_path / "out")
        # what is encoded once is not encoded again
        assert calls == []
    finally:
        encoder.documents = encode  # type: ignore[method-assign]
    store = ExactStore(tmp_path / "store", meta_for(encoder, "sequential", 2))
    assert index(texts, encoder, store).added == 4
    assert search(["c a f"], encoder, store, 1).ids == [["x"]]
    with pytest.raises(InputError, match="store: it holds layer None, not 1"):
        search(["c a f"], TokenEncoder(encoder.backbone, layer=1), store)
