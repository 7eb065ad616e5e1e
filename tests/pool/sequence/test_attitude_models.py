from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
from tests.pools import shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import (
    AttitudeBatch,
    AttitudeModel,
    Context,
    Entity,
    TermVectors,
    Vocabulary,
    attitude_f1,
    contexts_of,
    document_attitudes,
    folds_of_documents,
    mass_by_type,
    train_attitudes,
)
from cenote.pool.sequence.sentiment_attitudes.models import KEYED, SELF, Keys, Name, scored, shown
from cenote.pool.sequence.sentiment_attitudes.terms import KINDS, batch_of

NAMES = get_args(Name)
WORDS = 20
BATCH = AttitudeBatch(
    torch.randint(2, WORDS, (2, 7), generator=torch.Generator().manual_seed(0)),
    torch.tensor([[1, 5], [2, 0]]),
    torch.tensor([[0, 1, 2, 0, 2, 1, 0]] * 2),
    torch.tensor([[2, 4, -1], [1, -1, -1]]),
    torch.tensor([[3, -1], [-1, -1]]),
    torch.tensor([[True] * 7, [True] * 4 + [False] * 3]),
)


def small(name: Name, keys: Keys = "e", **settings: object) -> AttitudeModel:
    vectors = TermVectors(WORDS, 4, reach=7, placed=2, kinds=len(KINDS), kind_width=2)
    return shaken(AttitudeModel(name, vectors, keys, **{"filters": 5, "hidden": 3, "rows": 2, "joined": 4} | settings))


@pytest.mark.parametrize("name", NAMES)
def test_models_by_name_do_not_see_padding_or_batch_mates(name: Name) -> None:
    model = small(name)
    found = model.attend(BATCH)
    assert found.logits.shape == (2, 3)
    assert (found.weights is None) == (name in ("cnn", "pcnn", "bilstm"))
    alone = AttitudeBatch(*(t[1:, :4] if t.shape[1] == 7 else t[1:] for t in BATCH))
    torch.testing.assert_close(model.attend(alone).logits, found.logits[1:])
    if found.weights is not None:
        assert not found.weights[1, :, 4:].any()
        torch.testing.assert_close(found.weights.sum(-1), torch.ones_like(found.weights.sum(-1)))


@pytest.mark.parametrize("keys", get_args(Keys))
@pytest.mark.parametrize("name", [*KEYED, "ian"])
def test_every_set_of_keys(name: Name, keys: Keys) -> None:
    model = small(name, keys)
    weights = model.attend(BATCH).weights
    assert weights.shape == (2, 2 if keys == "e" and name != "ian" else 1, 7)
    moved = BATCH._replace(entities=torch.tensor([[6, 0], [3, 1]]), frames=BATCH.frames.roll(1, 0))
    assert not torch.allclose(model(moved), model(BATCH))


def test_the_models_written_out() -> None:
    x = small("att-pcnn").embed(BATCH)
    assert x.shape == (2, 7, 10)
    model = small("att-pcnn")
    x = model.embed(BATCH)
    states = model.encoder(x, BATCH.mask)
    y = torch.cat([model.pieces(states, BATCH.entities, BATCH.mask), model.keyed(x, BATCH.entities, BATCH.mask)], -1)
    torch.testing.assert_close(model(BATCH), model.classifier(y))
    model = small("att-cnn", "f")
    x = model.embed(BATCH)
    states = model.encoder(x, BATCH.mask)
    best = torch.stack([states[0].amax(0), states[1, :4].amax(0)])
    y = torch.cat([best, model.keyed(x, BATCH.frames, BATCH.mask)], -1)
    torch.testing.assert_close(model(BATCH), model.classifier(y))
    model = small("att-blstm", "sef")
    x = model.embed(BATCH)
    _, (last, _) = model.encoder.lstm(x[1:, :4])
    keys = torch.tensor([[2, 1, 0, -1, -1, -1, -1]])
    y = torch.cat([last[:, 0].flatten(), model.keyed(x[1:, :4], keys)[0]])
    torch.testing.assert_close(model(BATCH)[1], model.classifier(y))
    model = small("bilstm-zhou")
    x = model.embed(BATCH)
    torch.testing.assert_close(model(BATCH), model.classifier(model.attention(model.states(x, BATCH.mask), BATCH.mask)))
    model = small("ian")
    x = model.embed(BATCH)[:1]
    y = model.interactive(x, x[:, [1, 5]])
    torch.testing.assert_close(model(BATCH)[:1], model.classifier(y))


def test_sizes_are_the_authors() -> None:
    vectors = TermVectors(9, 30, kinds=len(KINDS))
    assert (vectors.places.table.num_embeddings, vectors.out_dim) == (100, 30 + 5 + 5 + 5)
    cnn = AttitudeModel("att-cnn", vectors)
    assert cnn.encoder.maps[0].weight.shape == (300, 45, 3)
    assert (cnn.keyed.map.out_features, cnn.classifier.out_features, cnn.dropout.p) == (10, 3, 0.5)
    lstm = AttitudeModel("bilstm-yang", vectors)
    assert (lstm.encoder.hidden, lstm.attention.u.shape, lstm.dropout_states.p) == (300, (1, 100), 0.2)
    lin = AttitudeModel("bilstm-lin", vectors).attention
    assert (lin.vectors, lin.map.out_features, lin.joined.out_features) == (1, 350, 200)
    ian = AttitudeModel("ian", vectors, "ef", position_biases=True).interactive.attention
    assert (ian.dim, len(ian.context_bias), len(ian.aspect_bias)) == (128, 50, 7)
    with pytest.raises(InputError, match="name: expected"):
        AttitudeModel("lstm", vectors)
    with pytest.raises(InputError, match="keys: expected letters"):
        small("att-cnn", "f")(BATCH._replace(frames=None))
    with pytest.raises(InputError, match="kinds: these vectors read"):
        small("cnn")(BATCH._replace(kinds=None))


WORDS_OF = [
    "Old",
    "Europe",
    "strongly",
    "rejects",
    "what",
    "Russia",
    "says",
    ",",
    "but",
    "the",
    "EU",
    "will",
    "go",
    "along",
    "with",
    "Russia",
]
ENTITIES = [Entity(1, 2, "europe"), Entity(5, 6, "russia"), Entity(10, 11, "europe"), Entity(15, 16, "russia")]


def test_text_becomes_terms() -> None:
    said = {("europe", "russia"): "negative"}
    first, second = contexts_of(
        WORDS_OF,
        ENTITIES,
        ["rejects", "go along"],
        sentiment=["old"],
        prepositions=["with"],
        attitudes=said,
        document="d",
    )
    assert first.terms[12] == "go along"
    kinds = dict(zip(first.terms, first.kinds, strict=True))
    assert [kinds[term] for term in ("Old", "Europe", "rejects", ",", "go along", "with", "says")] == [
        "sentiment",
        "entity",
        "frame",
        "token",
        "frame",
        "preposition",
        "word",
    ]
    # the nearest two make the pair, the others are synonyms
    assert (first.subject, first.object_, first.subject_synonyms, first.object_synonyms) == (1, 5, (10,), (14,))
    assert first.frames == (3, 12)
    assert (first.label, second.label) == ("negative", "neutral")
    assert (second.subject, second.object_, second.pair) == (5, 1, ("russia", "europe"))
    (cut, _) = contexts_of(WORDS_OF, ENTITIES, ["rejects"], longest=6)
    assert cut.terms == ("Europe", "strongly", "rejects", "what", "Russia", "says")
    assert (cut.subject, cut.object_, cut.object_synonyms) == (0, 4, ())
    (cut, _) = contexts_of(WORDS_OF, ENTITIES, ["rejects"], longest=5)
    assert cut.terms == ("Europe", "strongly", "rejects", "what", "Russia")
    assert contexts_of(WORDS_OF, ENTITIES, ["rejects"], longest=4) == []
    with pytest.raises(InputError, match="entities: expected spans of the 16 words"):
        contexts_of(WORDS_OF[:16], [Entity(3, 9, "a"), Entity(5, 6, "b")], [])


def test_terms_become_numbers_with_pads() -> None:
    contexts = contexts_of(WORDS_OF, ENTITIES, ["rejects", "go along"])
    vocabulary = Vocabulary.learn([t.lower() for t in c.terms] for c in contexts)
    batch = batch_of(contexts, vocabulary, 50)
    assert batch.terms.shape == batch.kinds.shape == batch.mask.shape == (2, 50)
    assert batch.frames.tolist() == [[3, 12, -1, -1, -1]] * 2
    assert batch.synonyms[0].tolist() == [10, -1, -1, 14, -1, -1]
    assert batch.keys("sef")[0].tolist() == [14, 12, 10, 5, 3, 1, -1, -1, -1, -1, -1, -1, -1]
    with pytest.raises(InputError, match="contexts: expected at most 5 terms"):
        batch_of(contexts, vocabulary, 5)
    with pytest.raises(InputError, match="contexts: expected at least one"):
        batch_of([], vocabulary)


def test_a_term_is_its_word_distances_and_kind() -> None:
    vectors = TermVectors(WORDS, 4, reach=3, placed=2, kinds=6, kind_width=1).double()
    x = vectors(BATCH)
    torch.testing.assert_close(x[0, 6, :4], vectors.words.weight[BATCH.terms[0, 6]])
    table = vectors.places.table.weight
    # 5 and 1 words behind subject and object; the reach ends at 2
    torch.testing.assert_close(x[0, 6, 4:8], torch.cat([table[3 + 2], table[3 + 1]]))
    torch.testing.assert_close(x[0, 6, 8:], vectors.kinds.weight[0])


def corpus(count: int) -> list[Context]:
    rng = random.Random(1)
    frames = {"praises": "positive", "attacks": "negative", "meets": "neutral"}
    found = []
    for i in range(count):
        verb = rng.choice(list(frames))
        words = ["today", "A", verb, "B", rng.choice(["again", "twice"])]
        pair = {("a", "b"): frames[verb]}
        entities = [Entity(1, 2, "a"), Entity(3, 4, "b")]
        found += contexts_of(words, entities, frames, attitudes=pair, document=f"d{i}")[:1]
    return found


@pytest.mark.parametrize("name", ["cnn", "att-cnn", "bilstm-lin", "ian"])
def test_attitudes_are_learnt_and_shown(name: Name) -> None:
    contexts = corpus(24)
    vocabulary = Vocabulary.learn([t.lower() for t in c.terms] for c in contexts)
    torch.manual_seed(0)
    model = AttitudeModel(name, TermVectors(len(vocabulary), 8), filters=12, hidden=8, rows=3, joined=8, dropout=0.0)
    history = train_attitudes(model, contexts, vocabulary, contexts[:9], passes=30, score_every=5, lr=1.0)
    assert len(history.scores) == 6
    assert history.losses[-1] < 0.5 * history.losses[0]
    assert scored(model, contexts, vocabulary).f1 > 0.9
    if name == "cnn":
        with pytest.raises(InputError, match="model: cnn has no attention"):
            shown(model, contexts[0], vocabulary)
    else:
        terms = shown(model, contexts[0], vocabulary)
        assert [t for t, _, _ in terms] == list(contexts[0].terms)
        assert sum(w for _, _, w in terms) == pytest.approx(1)
        batch = batch_of(contexts, vocabulary)
        mass = mass_by_type(model.attend(batch).weights, batch.kinds, len(KINDS))
        torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass.sum(-1)))


def test_classes_weigh_the_same_and_bags_are_of_two_or_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = corpus(16)
    vocabulary = Vocabulary.learn([t.lower() for t in c.terms] for c in contexts)
    from cenote.pool.sequence.sentiment_attitudes import models

    sizes, weights, rates = [], [], []
    entropy, adadelta = nn.functional.cross_entropy, torch.optim.Adadelta

    def seen(logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        sizes.append(len(y))
        weights.append(weight)
        return entropy(logits, y, weight)

    def made(parameters: object, lr: float) -> torch.optim.Optimizer:
        rates.append(lr)
        return adadelta(parameters, lr=lr)

    monkeypatch.setattr(models.F, "cross_entropy", seen)
    monkeypatch.setattr(models.torch.optim, "Adadelta", made)
    for name, size in (("cnn", 8), ("bilstm-zhou", 2), ("att-cnn", 2)):
        sizes.clear()
        model = AttitudeModel(name, TermVectors(len(vocabulary), 4), filters=2, hidden=2)
        train_attitudes(model, contexts, vocabulary, passes=1)
        assert set(sizes) == {size}
    assert set(rates) == {0.1}
    counts = torch.tensor([sum(c.label == label for c in contexts) for label in ("positive", "negative", "neutral")])
    torch.testing.assert_close(weights[0], 16 / (3 * counts.float()))
    with pytest.raises(InputError, match="contexts: expected labels"):
        train_attitudes(AttitudeModel("cnn", TermVectors(9, 4)), [contexts[0]._replace(label=None)], vocabulary)


def context(document: str, pair: tuple[str, str]) -> Context:
    return Context(("A", "B"), ("entity", "entity"), 0, 1, (), (), (), pair, document)


def test_contexts_vote_on_a_pair() -> None:
    pair, other = ("a", "b"), ("b", "a")
    contexts = [context("d", pair)] * 4 + [context("d", other)] * 2 + [context("e", pair)]
    labels = ["positive", "neutral", "positive", "neutral", "positive", "negative", "neutral"]
    assert document_attitudes(contexts, labels) == {"d": {pair: "positive", other: "neutral"}, "e": {pair: "neutral"}}
    with pytest.raises(InputError, match="labels: expected one for each of 7"):
        document_attitudes(contexts, labels[:2])


def test_f1_of_documents_by_hand() -> None:
    p, q, r = ("a", "b"), ("b", "a"), ("a", "c")
    truth = {"d": {p: "positive", q: "negative", r: "positive"}, "e": {p: "neutral"}}
    found = {"d": {p: "positive", q: "positive", r: "negative"}}
    # d: positive 1 of 2 found, 1 of 2 right; negative none right; e: nothing to find, and nothing found
    scores = attitude_f1(found, truth)
    assert (scores.positive, scores.negative, scores.f1) == (0.75, 0.5, 0.625)
    assert attitude_f1({}, {"d": {p: "positive"}}).positive == 0.0
    with pytest.raises(InputError, match="truth: expected at least one"):
        attitude_f1(found, {})


def test_folds_are_of_whole_documents() -> None:
    contexts = [context(name, ("a", "b")) for name in "aaabbcd"]
    folds = folds_of_documents(contexts)
    assert sorted(document for fold in folds for document in fold) == ["a", "b", "c", "d"]
    with pytest.raises(InputError, match="folds: expected 1 to 4"):
        folds_of_documents(contexts, 5)


def test_self_attention_models_have_no_keys() -> None:
    for name in SELF:
        assert small(name).keyed is None
