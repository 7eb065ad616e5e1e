from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tests.pools import features

import cenote
from cenote.core import InputError
from cenote.pool import (
    DependencyPool,
    IndexSetPool,
    RelationClassifier,
    RelationExample,
    RelationExtractor,
    read_ddi,
    read_standoff,
    with_trees,
)
from cenote.pool.sequence.biomedical_re_pooling.classifier import RelationBatch
from cenote.pool.sequence.biomedical_re_pooling.corpora import aligned, words_in

NAMES = [m.name for m in cenote.methods(room="pool", kind="relations")]
ENCODERS = ["cnn", "lstm", "tree", "none"]


def example(words: str, label: str | None = None, heads: tuple[int, ...] | None = None) -> RelationExample:
    cut = tuple(words.split())
    subject, object_ = cut.index("A"), cut.index("B")
    return RelationExample(cut, (subject, subject + 1), (object_, object_ + 1), label, heads=heads)


def taught(count: int = 40) -> list[RelationExample]:
    """The word between the mentions says the relation; outside stands another."""
    rng = random.Random(0)
    found = []
    for _ in range(count):
        word, label = rng.choice([("raises", "effect"), ("lowers", "advise"), ("and", "none")])
        words = f"A {word} B then {rng.choice(['raises', 'lowers'])}"
        found.append(example(words, label, (1, -1, 1, 1, 3)))
    return found


def test_every_pooling_has_a_name() -> None:
    assert {
        "sent-max",
        "sent-mean",
        "sent-att",
        "sent-last",
        "ent-only",
        "ent-sent",
        "ent-dym",
        "dep0",
        "ent-dep0",
    } <= set(NAMES)
    assert cenote.create("ent-only", dim=4).out_dim == 8
    assert cenote.create("dep0", dim=4).out_dim == 4
    assert all(isinstance(cenote.create(name, dim=4), IndexSetPool) for name in NAMES)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("pool", NAMES)
def test_every_encoder_is_crossed_with_every_pooling(encoder: str, pool: str) -> None:
    torch.manual_seed(0)
    model = (
        RelationClassifier(pool, 3, 20, 6, encoder, 4, feature_width=2, types=3, relations=4, tags=5).double().eval()
    )
    ids = torch.randint(2, 20, (2, 5))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    heads = torch.tensor([[1, -1, 1, 2, 3], [1, -1, 1, -2, -2]])
    numbers = torch.tensor([[1, 2, 0, 1, 2]] * 2)
    spans = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[3, 5], [2, 3]])
    batch = RelationBatch(ids, mask, *spans, heads, numbers, numbers, numbers)
    logits = model(batch)
    assert logits.shape == (2, 3)
    alone = RelationBatch(*(t[1:, :3] if t.shape[1] == 5 else t[1:] for t in batch))
    torch.testing.assert_close(model(alone), logits[1:])
    torch.testing.assert_close(model.attend(batch)[0], logits)


def test_features_are_read_and_asked_for() -> None:
    model = RelationClassifier("ent-sent", 2, 9, 4, "none", 3, types=3, dropout=0.0)
    ids, mask = torch.tensor([[2, 3, 4]]), torch.ones(1, 3, dtype=torch.bool)
    spans = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    one, other = (model(RelationBatch(ids, mask, *spans, types=torch.tensor([[k, 0, 1]]))) for k in (1, 2))
    assert not torch.equal(one, other)
    with pytest.raises(InputError, match="types: this classifier reads them"):
        model(RelationBatch(ids, mask, *spans))
    with pytest.raises(InputError, match="words: this classifier reads numbers"):
        model(RelationBatch(torch.randn(1, 3, 4), mask, *spans))
    with pytest.raises(InputError, match="pool: mean does not pool words around two mentions"):
        RelationClassifier("mean", 2, 9)
    with pytest.raises(InputError, match="pool: reads words of width 7"):
        RelationClassifier(DependencyPool(7), 2, 9)


@pytest.mark.parametrize("encoder", ["cnn", "lstm", "tree"])
def test_relations_are_learnt_and_the_words_are_shown(encoder: str) -> None:
    extractor = RelationExtractor("ent-dep0", encoder, hidden=24, dim=16, dropout=0.1)
    examples = taught()
    history = extractor.fit(examples, examples[:20], passes=40, batch=10, lr=0.01, patience=20, class_weights=True)
    assert extractor.labels == ("none", "advise", "effect")
    assert history.scores[history.best] == max(history.scores) == 1.0
    scores = extractor.score(examples)
    assert scores.micro_f1 == 1.0
    assert scores.f1.keys() == {"none", "advise", "effect"}
    found = extractor.predict(examples[:2])
    assert found[0].label == examples[0].label
    assert sum(found[0].probabilities.values()) == pytest.approx(1)
    way = [word for word, _ in found[0].words[2]]
    assert set(way) <= {"A", examples[0].words[1], "B"}
    assert not found[0].fallback
    assert extractor.predict([]) == []


def test_learning_is_the_same_with_the_same_seed_and_leaves_the_generator() -> None:
    found = []
    for _ in range(2):
        extractor = RelationExtractor("ent-only", "none", hidden=4, dim=4)
        before = torch.get_rng_state()
        extractor.fit(taught(12), taught(6), passes=2)
        assert torch.equal(before, torch.get_rng_state())
        found.append(extractor.predict(taught(3))[0].probabilities)
    assert found[0] == found[1]


def test_vectors_of_another_model_stand_in_for_words() -> None:
    table = dict(zip(("A", "B", "raises", "lowers", "and", "then"), features(1, 6, 6)[0].float(), strict=True))

    def vectors(sentences: list[tuple[str, ...]]) -> list[torch.Tensor]:
        return [torch.stack([table[word] for word in sentence]) for sentence in sentences]

    extractor = RelationExtractor("ent-dep0", "none", vectors, hidden=24, dropout=0.0)
    examples = taught()
    extractor.fit(examples, examples, passes=40, batch=10, lr=0.02, patience=None)
    assert extractor.score(examples).micro_f1 == 1.0
    assert extractor.model.words is None
    assert extractor.model.dim == 6


def test_what_cannot_be_learnt_is_refused() -> None:
    extractor = RelationExtractor()
    with pytest.raises(InputError, match="model: this extractor has not learnt yet"):
        extractor.predict(taught(1))
    with pytest.raises(InputError, match="all with a label"):
        extractor.fit([example("A x B")], taught(1))
    with pytest.raises(InputError, match="heads: 1 of 2 sentences have them"):
        RelationExtractor("ent-only", "none").fit([*taught(1), example("A x B", "none")], taught(1))
    extractor = RelationExtractor("ent-only", "none", hidden=4, dim=4)
    extractor.fit(taught(8), taught(4), passes=1)
    with pytest.raises(InputError, match="label: strange was not among"):
        extractor.score([example("A x B", "strange")])


def test_standoff_annotation_is_read(tmp_path: Path) -> None:
    text = "Listeria monocytogenes lives in raw milk. It was found. Soil is a habitat of E coli."
    (tmp_path / "a.txt").write_text(text, "utf-8")
    named = ("Listeria monocytogenes", "raw milk", "Soil", "E coli")
    at = {name: (text.index(name), text.index(name) + len(name)) for name in named}
    kinds = {"Listeria monocytogenes": "Bacteria", "E coli": "Bacteria"}
    lines = [f"T{i}\t{kinds.get(n, 'Habitat')} {s} {e}\t{n}" for i, (n, (s, e)) in enumerate(at.items(), 1)]
    (tmp_path / "a.a1").write_text("\n".join(lines), "utf-8")
    pairs = [("Bacteria", "Habitat")]
    assert [e.label for e in read_standoff(tmp_path, pairs)] == [None, None]
    (tmp_path / "a.a2").write_text("R1\tLives_In Bacterium:T1 Location:T2\n", "utf-8")
    first, second = read_standoff(tmp_path, pairs)
    assert first.words[slice(*first.subject)] == ("Listeria", "monocytogenes")
    assert first.words[slice(*first.object_)] == ("raw", "milk")
    assert (first.label, first.types) == ("Lives_In", ("Bacteria", "Habitat"))
    assert second.label == "none"
    assert second.words[slice(*second.object_)] == ("Soil",)
    (tmp_path / "a.a1").write_text("T1\tBacteria here\tx", "utf-8")
    with pytest.raises(InputError, match="annotation: expected a kind"):
        read_standoff(tmp_path, pairs)
    with pytest.raises(InputError, match=r"folder: there is no \.txt file"):
        read_standoff(tmp_path / "none", pairs)


def test_the_ddi_corpus_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.xml").write_text(
        '<document id="d"><sentence id="s" text="Aspirin raises warfarin, not iron.">'
        '<entity id="e0" charOffset="0-6" type="drug" text="Aspirin"/>'
        '<entity id="e1" charOffset="15-22" type="drug" text="warfarin"/>'
        '<entity id="e2" charOffset="29-32" type="brand" text="iron"/>'
        '<pair id="p0" e1="e0" e2="e1" ddi="true" type="effect"/><pair id="p1" e1="e0" e2="e2" ddi="false"/>'
        "</sentence></document>",
        "utf-8",
    )
    for path in (tmp_path, tmp_path / "d.xml"):
        first, second = read_ddi(path)
        assert (first.label, second.label) == ("effect", "none")
        assert first.words[slice(*first.object_)] == ("warfarin",)
        assert second.words[slice(*second.object_)] == ("iron",)
        assert second.types == ("drug", "brand")
    (tmp_path / "d.xml").write_text("<document>", "utf-8")
    with pytest.raises(InputError, match="is no XML"):
        read_ddi(tmp_path)
    with pytest.raises(InputError, match="path: there is no XML file"):
        read_ddi(tmp_path / "x")


def test_trees_come_from_a_parser_once_per_sentence() -> None:
    from cenote.pool.sequence.dependency_trees import ParsedSentence

    asked = []

    def parse(words: tuple[str, ...]) -> ParsedSentence:
        asked.append(words)
        return ParsedSentence(tuple(words), (1, -1, 1), ("a", "root", "b"), ("X", "Y", "Z"))

    first, second = with_trees([example("A x B"), example("A x B")], parse)
    assert first.heads == second.heads == (1, -1, 1)
    assert len(asked) == 1
    with pytest.raises(InputError, match="parse: gave 3 words for the 4"):
        with_trees([example("A x B y")], parse)


def test_mentions_inside_of_words_are_aligned_with_them() -> None:
    words = words_in("non-steroidal")
    assert aligned(words, 0, 3) == (0, 1)
    assert aligned(words, 2, 6) == (0, 3)
    assert aligned(words, 50, 60) == (0, 0)
