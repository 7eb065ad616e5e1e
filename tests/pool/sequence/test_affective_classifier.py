from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.pools import features, shaken
from torch import Tensor, nn

from cenote.core import InputError
from cenote.pool import (
    AffectiveClassifier,
    AffectiveReader,
    AttentionalAffine,
    BaselineAttention,
    Lexicon,
    installed_lexicon,
    read_afinn,
    read_bing_liu,
    read_liwc,
    read_mpqa,
    read_nrc,
    read_semeval,
    read_vader,
)
from cenote.pool.sequence.attention_conditioning.classifier import WAYS

MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
QUIET = {"noise": 0.0, "dropout": 0.0, "dropout_states": 0.0}


def small(**settings: object) -> AffectiveClassifier:
    return shaken(AffectiveClassifier(**{"features": 3, "classes": 2, "words": 9, "dim": 4, "hidden": 6} | settings))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([[2, 3, 4, 5, 6], [7, 8, 2, 0, 0]]), features(2, 5, 3, seed=4), MASK


def test_the_classifier_written_out() -> None:
    model, (ids, c, mask) = small(), inputs()
    embedded = model.words(ids)
    states, _ = model.encoder.lstm(embedded)
    pooled = model.attention.attend(states, c, mask)
    logits, weights = model.attend(ids, c, mask)
    torch.testing.assert_close(logits, model.classifier(pooled.output))
    torch.testing.assert_close(weights, pooled.weights.squeeze(1))
    assert not model.encoder.lstm.bidirectional


def test_defaults_are_the_authors() -> None:
    model = AffectiveClassifier(features=73, classes=2, words=5)
    lstm = model.encoder.lstm
    assert (lstm.input_size, lstm.hidden_size, lstm.num_layers) == (300, 150, 1)
    assert (model.noise, model.dropout.p, model.dropout_states.p) == (0.1, 0.2, 0.3)
    two = AffectiveClassifier(features=73, classes=2, words=5, layers=2).encoder.lstm
    assert (two.num_layers, two.dropout) == (2, 0.3)


@pytest.mark.parametrize("way", ["none", *WAYS])
@pytest.mark.parametrize(
    ("joined", "layers", "width"),
    [
        ("nowhere", 1, 6),
        ("embeddings", 1, 6),
        ("states", 2, 9),
        ("nowhere", 0, 4),
        ("embeddings", 0, 7),
    ],
)
def test_every_way_to_use_the_lexicon(way: str, joined: str, layers: int, width: int) -> None:
    model, (ids, c, mask) = small(way=way, joined=joined, layers=layers), inputs()
    logits, weights = model.attend(ids, c, mask)
    assert model.classifier.in_features == width
    torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
    alone = model(ids[1:, :3], c[1:, :3], mask[1:, :3])
    torch.testing.assert_close(alone, logits[1:])
    told = not torch.allclose(model(ids, 2 * c, mask), logits)
    assert told == (way != "none" or joined != "nowhere")


def test_joined_features_stand_behind_what_they_are_joined_to() -> None:
    ids, c, mask = inputs()
    model = small(way="none", joined="embeddings", scorer=2)
    states, _ = model.encoder.lstm(torch.cat([model.words(ids), c], -1))
    torch.testing.assert_close(model.states(ids, c, mask)[0], states[0])
    assert isinstance(model.attention, BaselineAttention)
    assert model.attention.hidden is not None
    model = small(joined="states")
    states, _ = model.encoder.lstm(model.words(ids))
    torch.testing.assert_close(model.states(ids, c, mask)[0], torch.cat([states, c], -1)[0])


def test_vectors_stand_in_for_words_and_an_attention_of_ones_own_may_be_given() -> None:
    _, c, mask = inputs()
    model = small(words=None, way=lambda dim, n: AttentionalAffine(dim, n, tanh=True))
    assert model(features(2, 5, 4), c, mask).shape == (2, 2)
    with pytest.raises(InputError, match="words: this classifier reads vectors of width 4"):
        model(torch.zeros(2, 5, dtype=torch.long), c, mask)
    with pytest.raises(InputError, match="way: expected"):
        small(way="sideways")


def test_noise_and_dropout_are_in_training_alone() -> None:
    ids, c, mask = inputs()
    for settings in ({"noise": 0.5}, {"dropout": 0.5}, {"dropout_states": 0.5}):
        model = small(**QUIET | settings)
        torch.testing.assert_close(model(ids, c, mask), model(ids, c, mask))
        model.train()
        assert not torch.equal(model(ids, c, mask), model(ids, c, mask))


def examples() -> tuple[list[list[str]], list[str], Lexicon]:
    sentences = [["a", word, noun] for word in ("fine", "poor") for noun in ("film", "book", "day", "cup")]
    labels = ["positive"] * 4 + ["negative"] * 4
    return sentences, labels, Lexicon({"own": {"fine": [1.0], "poor": [1.0]}})


@pytest.mark.parametrize("way", ["none", "affine"])
def test_sentences_are_learnt_and_explained(way: str) -> None:
    sentences, labels, lexicon = examples()
    reader = AffectiveReader(lexicon, dim=8, hidden=8, way=way)
    history = reader.fit(
        sentences, labels, sentences, labels, score="macro F1", passes=40, batch=4, lr=0.02, patience=15
    )
    assert max(history.scores) == 1.0
    assert reader.score(sentences, labels) == {"accuracy": 1.0, "macro F1": 1.0, "macro recall": 1.0}
    found = reader.predict([["a", "poor", "film"], ["fine"]])
    assert [f.label for f in found] == ["negative", "positive"]
    assert [word for word, _ in found[0].weights] == ["a", "poor", "film"]
    assert sum(weight for _, weight in found[0].weights) == pytest.approx(1)
    assert found[0].entries == {"poor": {"own": 1.0}}
    assert reader.predict([]) == []


def test_vectors_from_elsewhere_stay_as_they_are() -> None:
    sentences, labels, lexicon = examples()
    vectors = {word: [float(i), 1.0, 0.0] for i, word in enumerate(["a", "fine", "poor", "film", "unseen"])}
    reader = AffectiveReader(lexicon, vectors, hidden=4)
    reader.fit(sentences, labels, sentences, labels, passes=2)
    weight = reader.model.words.weight
    assert not weight.requires_grad
    for word, vector in vectors.items():
        assert weight[reader.vocabulary[word]].tolist() == vector
    assert reader.vocabulary["book"] == 1


def test_what_cannot_be_learnt_is_refused() -> None:
    sentences, labels, lexicon = examples()
    reader = AffectiveReader(lexicon, dim=4, hidden=4)
    with pytest.raises(InputError, match="model: this reader has not learnt yet"):
        reader.predict(sentences)
    with pytest.raises(InputError, match="labels: expected one for each of 8"):
        reader.fit(sentences, labels[:3], sentences, labels)
    with pytest.raises(InputError, match="labels: strange was not among"):
        reader.fit(sentences, labels, sentences[:1], ["strange"], passes=1)


def test_published_lexicons_are_read(tmp_path: Path) -> None:
    def file(name: str, text: str, encoding: str = "utf-8") -> Path:
        (tmp_path / name).write_text(text, encoding)
        return tmp_path / name

    mpqa = file(
        "mpqa",
        "type=strongsubj len=1 word1=abuse pos1=verb stemmed1=y priorpolarity=negative\n"
        "type=weaksubj len=1 word1=abuse pos1=noun stemmed1=n priorpolarity=negative\n"
        "type=weaksubj len=1 word1=able pos1=adj stemmed1=n priorpolarity=positive\n",
    )
    assert read_mpqa(mpqa) == {"abuse": (0.5, 0.0, 1.0), "able": (0.0, 1.0, 0.0)}
    positive, negative = file("p", ";remark\ngood\nna\u00efve\n", "latin-1"), file("n", "bad\nna\u00efve\n", "latin-1")
    assert read_bing_liu(positive, negative) == {"good": (1.0,), "bad": (-1.0,), "na\u00efve": (0.0,)}
    assert read_afinn(file("afinn", "good\t3\ncan't stand\t-3\n")) == {"good": (3.0,), "can't stand": (-3.0,)}
    nrc = read_nrc(file("nrc", "fear\tanger\t0\nfear\tfear\t1\n"))
    assert (sum(nrc["fear"]), nrc["fear"][3], len(nrc["fear"])) == (1.0, 1.0, 10)
    assert read_semeval(file("semeval", "0.984\tloves\n-0.5\tno fun\n")) == {"loves": (0.984,), "no fun": (-0.5,)}
    assert read_vader(file("vader", ":)\t2.0\t1.1\t[2, 2]\n")) == {":)": (2.0,)}
    liwc = read_liwc(file("liwc", "%\n1\tposemo\n2\tnegemo\n%\nhapp*\t1\nsad\t2\n"))
    lexicon = Lexicon({"liwc": liwc, "afinn": read_afinn(tmp_path / "afinn")})
    assert lexicon.lookup(["Happily", "sad", "good", "hap"]).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 3], [0, 0, 0]]
    for call, told in (
        (lambda: read_afinn(file("bad", "good\n")), "in line 1 of"),
        (lambda: read_mpqa(file("bad", "len=1\n")), "expected word1="),
        (lambda: read_nrc(file("bad", "a\tb\t1\n")), "expected word, emotion"),
        (lambda: read_liwc(file("bad", "%\n1\tx\n")), "between two lines %"),
        (lambda: read_liwc(file("bad", "%\n1\tx\n%\nword\t7\n")), "numbers of categories"),
        (lambda: read_vader(tmp_path / "nowhere"), "there is no file"),
    ):
        with pytest.raises(InputError, match=told):
            call()


def test_the_lexicon_of_an_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="neither vaderSentiment nor afinn is installed"):
        installed_lexicon()
    packages = {
        "afinn": ("data/AFINN-en-165.txt", "good\t3\n", 3.0),
        "vaderSentiment": ("vader_lexicon.txt", "good\t1.9\t0.9\t[]\n", 1.9),
    }
    for name, (file, line, number) in packages.items():
        place = tmp_path / name / name
        (place / file).parent.mkdir(parents=True)
        (place / "__init__.py").write_text("")
        (place / file).write_text(line)
        monkeypatch.syspath_prepend(str(tmp_path / name))
        assert installed_lexicon() == {"good": (number,)}


def test_padding_does_not_reach_a_gradient() -> None:
    model, (ids, c, mask) = small(), inputs()
    c = c.clone().requires_grad_()
    nn.functional.cross_entropy(model(ids, c, mask), torch.tensor([0, 1])).backward()
    assert not c.grad[~mask].any()
