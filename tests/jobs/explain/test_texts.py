"""Texts and images of transformers' classifiers: how parts are taken away, and what cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.jobs.explain.models import LABELS, image_classifier, sentences, text_classifier
from tests.jobs.explain.subjects import Additive, Truth, vectors

from cenote.core import InputError
from cenote.explain import GlobEnc
from cenote.features.raw import open_raw
from cenote.jobs.explain import Texts, audit, digits
from cenote.jobs.explain.items import pictures, taken
from cenote.jobs.explain.measure import Bench
from cenote.jobs.explain.one import look
from cenote.models.classifier import ImageClassifier, TextClassifier, load_classifier

TEXTS = ["a b c d", "e f g", "h i j k l m", "n o p q r", "s t u"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_classifier(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def classifier(folder: Path) -> TextClassifier:
    return TextClassifier(load_classifier(str(folder)))


def test_dropped_words_are_as_if_they_had_never_been_written(classifier: TextClassifier) -> None:
    subject = Texts(classifier, ["a b c d", "a c"])
    keep = torch.tensor([[True, True, False, True, False, True], [True] * 6])
    found = subject.outputs(torch.tensor([0, 1]), keep, "drop")
    torch.testing.assert_close(found[0], found[1])
    nothing = subject.outputs(torch.tensor([0]), torch.tensor([[True, False, False, False, False, True]]), "drop")
    with torch.no_grad():
        empty = classifier.loaded.model(input_ids=torch.tensor([[2, 3]])).logits
    torch.testing.assert_close(nothing, empty)


def test_masked_words_leave_their_place(classifier: TextClassifier) -> None:
    subject = Texts(classifier, ["a b c d", "a [MASK] c"])
    assert subject.fills == ("drop", "[MASK]")
    keep = torch.tensor([[True, True, False, True, True, True]])
    found = subject.outputs(torch.tensor([0]), keep, "[MASK]")
    with torch.no_grad():
        expected = classifier.loaded.model(input_ids=torch.tensor([[2, 5, 4, 7, 8, 3]])).logits
    torch.testing.assert_close(found, expected)


def test_words_are_made_of_tokens_and_special_tokens_are_of_none(classifier: TextClassifier) -> None:
    encoded = classifier.encode("a b.c  d")
    assert encoded.words == ("a", "b.c", "d")
    assert encoded.word[0] == encoded.word[-1] == -1
    assert encoded.word[1:-1] == (0, 1, 1, 1, 2)
    subject = Texts(classifier, ["a b.c  d"])
    assert subject.sizes["words"].tolist() == [[-1, 0, 1, 1, 1, 2, -1]]
    assert subject.sizes["tokens"].tolist() == [[-1, 0, 1, 2, 3, 4, -1]]


def test_an_audit_of_texts_ends_to_end(folder: Path) -> None:
    pytest.importorskip("captum", reason="cenote[explain] is not installed")
    found = audit(str(folder), TEXTS, ["occlusion", "mean-attention"], labels=["sad"] * 5)
    assert set(found.controls) == {"random", "position", "token-length", "embedding-norm"}
    assert list(found.orders) == ["words, drop", "words, [MASK]", "tokens, drop"]
    assert found.dataset["classes"] == list(LABELS.values())
    assert found.dataset["kind"] == "texts"
    assert "5 test units cannot carry one" in found.sentence


def test_an_audit_of_images_ends_to_end(tmp_path: Path) -> None:
    pytest.importorskip("captum", reason="cenote[explain] is not installed")
    loaded = load_classifier(str(image_classifier(tmp_path / "model")))
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    made = taken(loaded, open_raw(tmp_path / "images", kind="image"))
    found = audit(made.subject, methods=["occlusion", "attention-rollout", "saliency"])
    assert not found.skipped
    assert found.gallery["grid"] == [4, 4]
    assert list(found.orders) == ["patches, black", "patches, mean colour", "2 x 2 patches, black"]
    assert all(len(i["scores"]["attention-rollout"]) == 16 for i in found.gallery["items"])


def test_one_text_is_explained_in_a_sentence(classifier: TextClassifier) -> None:
    found = look(Texts(classifier, ["a b c d"], ["text"]), "mean-attention")
    assert found.words == ("a", "b", "c", "d")
    assert found.label in LABELS.values()
    assert found.sentence.startswith(f"{found.label!r} with probability 0.")
    assert "(mean-attention). The " in found.sentence
    assert "is most important for the prediction." in found.sentence
    with pytest.raises(InputError, match="no method is called 'magic'"):
        look(Texts(classifier, ["a b c d"]), "magic")


def test_globenc_scores_the_words_of_a_text(classifier: TextClassifier) -> None:
    subject = Texts(classifier, ["a b.c d"], ["text"])
    found = look(subject, "globenc")
    assert found.words == ("a", "b.c", "d")
    tokens = GlobEnc().explain(subject.model, subject.inputs(0)).scores[0]
    expected = [tokens[1], tokens[2:5].sum(), tokens[5]]
    torch.testing.assert_close(torch.tensor(found.scores), torch.stack(expected).float())
    assert float(tokens.sum()) == pytest.approx(1.0, abs=1e-5)
    assert "(globenc). The " in found.sentence


def test_columns_of_names_and_numbers_both_tell_the_class(folder: Path, tmp_path: Path) -> None:
    loaded = load_classifier(str(folder))
    table = sentences(tmp_path / "texts.csv")
    assert taken(loaded, open_raw(table, kind="text"), "mood").labels == tuple(LABELS[i % 3] for i in range(16))
    (tmp_path / "numbers.csv").write_text("text,mood\na b,1\nc d,0\n")
    assert taken(loaded, open_raw(tmp_path / "numbers.csv", kind="text"), "mood").labels == ("glad", "sad")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a b,sad\n  ,sad\n", "1: holds no text; leave it out, or give --skip-bad"),
        (f"a b,sad\n{'a ' * 40},sad\n", "1: has 42 tokens, and .* reads 32; shorten it or leave it out"),
        ("a b,sad\nc d,angry\n", "label: the model has no class 'angry'; it has sad, glad, plain"),
    ],
)
def test_rows_that_cannot_be_used_are_named(folder: Path, tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "texts.csv").write_text(f"text,mood\n{rows}")
    with pytest.raises(InputError, match=message):
        taken(load_classifier(str(folder)), open_raw(tmp_path / "texts.csv", kind="text"), "mood")


def test_rows_that_cannot_be_used_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text(f"text\na b\n{'a ' * 40}\nc d\n")
    found = taken(load_classifier(str(folder)), open_raw(tmp_path / "texts.csv", kind="text"), skip_bad=True)
    assert len(found.subject.names) == 2
    assert next(why for _, why in found.left_out).startswith("has 42 tokens")


def test_a_column_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label_column: there is no column 'stars'"):
        taken(load_classifier(str(folder)), open_raw(sentences(tmp_path / "texts.csv"), kind="text"), "stars")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": []}, "inputs: expected texts or images, got none"),
        ({"inputs": ["a b", ""]}, "text 1: is empty; leave it out"),
        ({"inputs": ["a", "b c"]}, "text 0: has 1 of words, and 2 are needed"),
        ({"inputs": ["a b c"] * 4}, "inputs: all 4 are the same"),
        ({"inputs": TEXTS, "target": "angry"}, "target: the model has no class 'angry'"),
        ({"inputs": TEXTS, "labels": ["sad"]}, "labels: expected one for each of 5 items, got 1"),
        ({"inputs": TEXTS, "methods": ["simpool"]}, "methods: simpool explains nothing"),
        ({"inputs": TEXTS, "seeds": 0}, "seeds: expected at least 1"),
    ],
)
def test_bad_arguments_are_one_clear_line_each(folder: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit(str(folder), **{"methods": ["mean-attention"], **given})


def test_models_that_classify_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model: .* is BertModel, and no classifier of texts or images"):
        load_classifier(str(tiny.bert(tmp_path / "bare")))
    with pytest.raises(InputError, match="gives 1 output, and an explanation is of a class among 2 or more"):
        load_classifier(str(text_classifier(tmp_path / "one", num_labels=1, id2label={0: "x"}, label2id={"x": 0})))
    with pytest.raises(InputError, match="model: there is no folder"):
        load_classifier(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"model: .* does not say how texts are prepared|knows no word"):
        TextClassifier(load_classifier(str(tiny.made(tmp_path / "mute", "BertForSequenceClassification", **tiny.TEXT))))


def test_a_tokenizer_without_offsets_is_named(classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(classifier.tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="does not tell which part of a text a token is"):
        TextClassifier(classifier.loaded)


def test_logits_that_are_no_numbers_are_named() -> None:
    model = Additive()
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="gives NaN or infinite logits for 24 of 24 items, item 0 first"):
        Bench(vectors(model))


def test_a_subject_of_one_class_is_named() -> None:
    subject = vectors(Additive())
    subject.labels = ("only",)
    with pytest.raises(InputError, match="has 1 class"):
        audit(subject, methods=(), explainers={"truth": Truth()})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_texts_of_other_lengths_beside_them_change_nothing(classifier: TextClassifier, kind: str) -> None:
    sizes = {"vocab_size": 40, "num_labels": 2}
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2ForSequenceClassification

        config = GPT2Config(n_embd=8, n_layer=1, n_head=2, **sizes)
        model = GPT2ForSequenceClassification(config).eval()
    else:
        from transformers import LlamaConfig, LlamaForSequenceClassification

        config = LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0, **sizes
        )
        model = LlamaForSequenceClassification(config).eval()
    subject = Texts(classifier, TEXTS)
    subject.model = model
    keep = torch.ones(len(TEXTS), subject._ids.shape[1], dtype=torch.bool)
    with torch.no_grad():
        found = subject.outputs(torch.arange(len(TEXTS)), keep, "drop")
        alone = torch.cat([model(**subject.inputs(item)).logits for item in range(len(TEXTS))])
    torch.testing.assert_close(found, alone)


def test_a_model_of_another_kind_than_an_explanation_takes_is_named() -> None:
    with pytest.raises(InputError, match=r"globenc: model: the norms of the block .* do not stand behind its sums"):
        look(digits(items=2), "globenc")
    with pytest.raises(InputError, match="attention-rollout: model: found no attention in Additive"):
        look(vectors(Additive(), items=2), "attention-rollout")


def test_images_of_several_sizes_are_named_and_grey_ones_are_taken(tmp_path: Path) -> None:
    loaded = load_classifier(str(image_classifier(tmp_path / "model")))
    images = ImageClassifier(loaded)
    with pytest.raises(InputError, match="images of several sizes; cut them to one"):
        pictures(loaded, images, [torch.zeros(3, 32, 32), torch.zeros(3, 32, 40)])
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.fromarray(np.full((20, 30), 90 * i, dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    assert taken(loaded, open_raw(tmp_path / "images", kind="image")).subject.inputs(0)["pixel_values"].shape[1] == 3
