from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cenote.core import InputError
from cenote.pool.sequence.attentive_mimicking.letter_ngrams import BOUNDARY, LetterNgrams
from cenote.pool.sequence.attentive_mimicking.mimic import Mimic, train_mimic
from cenote.pool.sequence.attentive_mimicking.word_contexts import contexts_of, count_words
from cenote.pool.sequence.attentive_mimicking.word_vectors import WordVectors

FRUITS, TOOLS = ["applin", "berrin", "plumin", "figgin"], ["hammok", "sawwok", "drillok", "filok"]
FILL = {"fruit": ["sweet", "ripe", "juicy"], "tool": ["heavy", "steel", "sharp"]}


def text() -> list[str]:
    lines = []
    for kind, words in (("fruit", FRUITS), ("tool", TOOLS)):
        for w in words:
            lines += [f"The {a} {w} was {b}." for a in FILL[kind] for b in FILL[kind]] * 2
    return lines


def vectors() -> WordVectors:
    g = torch.Generator().manual_seed(0)
    words = [*FRUITS, *TOOLS, *FILL["fruit"], *FILL["tool"], "the", "was"]
    fruit, tool = torch.randn(2, 6, generator=g)
    centre = {**dict.fromkeys(FRUITS + FILL["fruit"], fruit), **dict.fromkeys(TOOLS + FILL["tool"], tool)}
    rows = [centre.get(w, torch.zeros(6)) + 0.1 * torch.randn(6, generator=g) for w in words]
    return WordVectors(words, torch.stack(rows))


def test_ngrams_of_short_words() -> None:
    ngrams = LetterNgrams(["abc"])
    assert ngrams.of("a") == [f"{BOUNDARY}a{BOUNDARY}"]
    assert ngrams.numbers("") == [0]
    assert len(ngrams.of("abcd")) == 4 + 3 + 2
    assert ngrams.numbers("abc")[1] == 1
    with pytest.raises(InputError, match="shortest"):
        LetterNgrams([], 4, 3)


def test_contexts_are_sampled_fairly_and_hold_no_target() -> None:
    lines = [f"w{i} x x" for i in range(200)] + ["x alone"]
    known = {f"w{i}": i for i in range(200)} | {"x": 999}
    found = contexts_of(["x", "absent"], lines, known, at_most=50)
    assert found["absent"] == []
    numbers = [c.words[0] for c in found["x"]]
    assert len(numbers) == 50
    assert 999 not in numbers
    # a sample of the first contexts alone would stay below 25
    assert sum(n >= 100 for n in numbers) > 10
    assert contexts_of(["x"], lines, known, at_most=50) == {"x": found["x"]}


def test_window() -> None:
    (context,) = contexts_of(["x"], ["a b x c d"], {c: i for i, c in enumerate("abcd")}, around=1)["x"]
    assert (context.words, context.distances) == ((1, 2), (-1, 1))


def test_a_rare_word_gets_the_vector_of_its_kind(tmp_path: Path) -> None:
    known, lines = vectors(), text()
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    mimic = train_mimic(known, tmp_path / "text.txt", least_count=10, least_ngram=2, epochs=40)
    assert mimic.losses[-1] < mimic.losses[0] / 2
    new = mimic.infer_from_text(
        ["Pearin", "Axok", "kiwi", "gone"], ["a sweet pearin was ripe", "the steel axok", "one juicy kiwi"]
    )
    assert new.words == ["pearin", "axok", "kiwi", "gone"]
    cos = torch.nn.functional.cosine_similarity
    fruit, tool = known.vectors[:4].mean(0, keepdim=True), known.vectors[4:8].mean(0, keepdim=True)
    prefers = cos(new.vectors, fruit) > cos(new.vectors, tool)
    # by its letters and contexts, the first two; by contexts alone, the third
    assert prefers[:3].tolist() == [True, False, True]

    new.save(tmp_path / "new.txt")
    again = WordVectors.read(tmp_path / "new.txt")
    assert again.words == new.words
    torch.testing.assert_close(again.vectors, new.vectors, rtol=1e-5, atol=1e-6)

    mimic.save(tmp_path / "model")
    loaded = Mimic.load(tmp_path / "model")
    assert loaded.losses == mimic.losses
    torch.testing.assert_close(
        loaded.infer_from_text(["pearin"], lines).vectors, mimic.infer_from_text(["pearin"], lines).vectors
    )


def test_what_a_word_was_made_of() -> None:
    mimic = train_mimic(vectors(), text(), least_count=10, least_ngram=2, epochs=2)
    found = contexts_of(["applin", "kiwi", "gone"], [*text()[:5], "one juicy kiwi"], mimic.known.number)
    shown = mimic.show(found, batch_size=2)
    assert list(shown) == ["applin", "kiwi", "gone"]
    assert [len(shown[w].weights) for w in shown] == [5, 1, 0]
    assert sum(shown["applin"].weights) == pytest.approx(1)
    assert shown["kiwi"].weights == pytest.approx((1.0,))
    assert shown["gone"].gate == 1
    assert 0 < shown["applin"].gate < 1
    alike = train_mimic(vectors(), text(), least_count=10, epochs=1, attentive=False)
    assert alike.show(found)["applin"].weights is None


def test_ngrams_are_left_out_in_training_alone() -> None:
    mimic = train_mimic(vectors(), text(), least_count=10, least_ngram=1, epochs=1)
    items = [("applin", []), ("a", [])] * 200
    whole = mimic.batch(items)
    thin = mimic.batch(items, 0.25, torch.Generator().manual_seed(0))
    count = thin.ngram_mask[::2].sum(1).double()
    assert abs(float(count.mean()) / len(mimic.ngrams.numbers("applin")) - 0.75) < 0.03
    assert torch.equal(whole.ngram_mask[0], whole.ngram_mask[2])
    for i in range(0, 400, 2):
        left = thin.ngrams[i][thin.ngram_mask[i]].tolist()
        known = iter(mimic.ngrams.numbers("applin"))
        assert all(n in known for n in left)
    # the one n-gram of a word of one letter is replaced by the unknown one
    ones = thin.ngrams[1::2, 0]
    assert thin.ngram_mask[1::2].sum(1).eq(1).all()
    assert abs(float((ones == 0).double().mean()) - (0.25 if mimic.ngrams.numbers("a") != [0] else 1)) < 0.1
    dropped = train_mimic(vectors(), text(), least_count=10, epochs=2, ngram_dropout=0.5)
    plain = train_mimic(vectors(), text(), least_count=10, epochs=2)
    assert dropped.losses != plain.losses
    with pytest.raises(InputError, match="ngram_dropout"):
        train_mimic(vectors(), text(), ngram_dropout=1.0)


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (train_mimic(vectors(), text(), least_count=10, epochs=2, seed=3) for _ in range(2))
    assert first.losses == second.losses
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)


def test_words_left_out_are_not_trained_on() -> None:
    mimic = train_mimic(vectors(), text(), least_count=10, epochs=1, leave_out=["applin"])
    assert not any("appl" in n for n in mimic.ngrams.ngrams)
    with pytest.raises(InputError, match="stands 1000 times"):
        train_mimic(vectors(), text(), least_count=1000)


def test_files_of_word_vectors(tmp_path: Path) -> None:
    file = tmp_path / "v.txt"
    file.write_text("a 1 2\nb 3 4\n", encoding="utf-8")
    assert WordVectors.read(file).vectors.tolist() == [[1, 2], [3, 4]]
    file.write_text("2 2\na 1 2\nb 3 4\n", encoding="utf-8")
    assert WordVectors.read(file, at_most=1).words == ["a"]
    for bad, match in (("a 1 2\nb 3\n", "line 2"), ("a 1 nan\n", "line 1"), ("", "no word"), ("a 1\na 2\n", "twice")):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(InputError, match=match):
            WordVectors.read(file)
    with pytest.raises(InputError, match="cannot be read"):
        WordVectors.read(tmp_path / "none.txt")
    with pytest.raises(InputError, match="white space"):
        WordVectors(["a b"], torch.ones(1, 2)).save(file)
    with pytest.raises(InputError, match="expected"):
        WordVectors(["a"], torch.ones(2, 2))
    assert count_words(["A b, a"]) == {"a": 2, "b": 1, ",": 1}


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no whole model"):
        Mimic.load(tmp_path)
