"""Head atlas and audit of choices of a saved decoder, from the command line to the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import cenote  # noqa: F401 - a fixture
from tests.cli.program import Run
from tests.jobs.explain.models import decoder, image_classifier, text_classifier

from cenote.core import InputError, files
from cenote.core.language import log_probabilities
from cenote.explain.repeated_tokens import KINDS, head_atlas
from cenote.jobs.explain.choices import Choices, choices, questions
from cenote.jobs.explain.heads import Heads, heads
from cenote.models.decoder import Decoder, load_decoder

ASKED = [
    {"question": "a b c", "choices": ["d", "e f"], "answer": 1},
    {"question": "g h", "choices": ["d", "e", "i"], "answer": "i"},
    {"question": "k", "choices": ["l", "m"], "answer": "B"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Decoder:
    return load_decoder(str(folder))


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_random_tokens_are_no_special_ones(loaded: Decoder) -> None:
    first, behind = loaded.plain_tokens
    assert (first, behind) == (2, 28)
    assert not set(range(first, behind)) & set(loaded.tokenizer.all_special_ids)


def test_the_atlas_is_that_of_the_room_and_reads_back(loaded: Decoder, tmp_path: Path) -> None:
    found = heads(loaded, ["a", "b", "c", "d"], concept_name="letters", sequences=4, period=12)
    expected = head_atlas(loaded.model, (2, 28), sequences=4, period=12)
    assert tuple(found.kinds) == KINDS
    assert found.shape == (3, 4)
    for name, kind in found.kinds.items():
        torch.testing.assert_close(torch.tensor(kind.scores), expected[name].scores, atol=1e-6, rtol=0)
        assert list(kind.found) == expected[name].heads()
    assert found.concept is not None
    best, words = found.concept.best[0]
    assert best.score == max(max(row) for row in found.concept.scores)
    assert set(words) <= {"a", "b", "c", "d"}
    assert f"Most about letters writes layer {best.layer}, head {best.head}" in found.sentence
    found.save(tmp_path)
    assert Heads.load(tmp_path) == found
    file = tmp_path / "heads.json"
    file.write_text(file.read_text().replace('"model": "', '"model": "other '))
    with pytest.raises(InputError, match="changed after it was written"):
        Heads.load(tmp_path)


def test_heads_from_the_command_line(cenote: Run, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "letters.txt").write_text("a\nb\n\nc\nd\n")
    out = tmp_path / "out"
    code, text, err = cenote("explain", folder, "--heads", "--concept", tmp_path / "letters.txt", "--out", out)
    assert code == 0, err
    found = Heads.load(out)
    assert found.sentence in " ".join(text.split())
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5
    assert found.sentence in page
    assert "http" not in page.replace("http-equiv", "")
    (out / "report.html").unlink()
    assert cenote("report", out)[0] == 0
    assert (out / "report.html").read_text() == page
    told = json.loads(cenote("explain", folder, "--heads", "--out", out, "--json")[1])
    assert told["concept"] is None
    assert set(told["kinds"]) == set(KINDS)


def test_choices_from_the_command_line(cenote: Run, folder: Path, loaded: Decoder, tmp_path: Path) -> None:  # noqa: F811
    file, out = written(tmp_path / "questions.jsonl", ASKED), tmp_path / "out"
    code, text, err = cenote("explain", folder, "--choices", file, "--out", out)
    assert code == 0, err
    found = Choices.load(out)
    assert found.sentence in " ".join(text.split())
    assert [s.name for s in found.styles] == ["not shown", "in a sentence", "with letters"]
    first = found.styles[0].items[0]
    expected = log_probabilities(loaded.model, loaded.tokenizer, "a b c", [" d", " e f"]).total.exp()
    torch.testing.assert_close(torch.tensor(first.probabilities), expected, atol=1e-6, rtol=0)
    assert first.mass == pytest.approx(float(expected.sum()), abs=1e-5)
    assert [i.answer for i in found.styles[0].items] == [1, 2, 1]
    assert all(s.attentiveness <= found.best.attentiveness for s in found.styles)
    page = (out / "report.html").read_text()
    assert found.sentence.replace("'", "&#39;") in page
    assert page.count("<dt>a b c</dt>") == 1
    told = json.loads(cenote("explain", folder, "--choices", file, "--out", out, "--json")[1])
    assert told["sentence"] == found.sentence


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is no JSON"),
        ("[1]", "line 2: expected question, choices and answer, got list"),
        ('{"choices": ["a", "b"], "answer": 0}', "line 2: has no question"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "line 2: expected 2 to 26 choices"),
        ('{"question": "q", "choices": ["a", " "], "answer": 0}', "line 2: expected 2 to 26 choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "line 2: expected as answer a number from 0 to 1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "c"}', "line 2: expected as answer .* got 'c'"),
        ('{"question": "q", "choices": ["a", "b"]}', "line 2: expected as answer .* got None"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(ASKED[0])}\n{line}\n")
    with pytest.raises(InputError, match=message):
        questions(path)


def test_a_question_that_is_too_long_is_named(loaded: Decoder, tmp_path: Path) -> None:
    rows = [ASKED[0], {"question": "a " * 60, "choices": ["b", "c"], "answer": 0}]
    with pytest.raises(InputError, match=r"question 1 .* is longer than the model takes"):
        choices(loaded, questions(written(tmp_path / "q.jsonl", rows)))


def test_choices_that_begin_others_are_noted(loaded: Decoder, tmp_path: Path) -> None:
    rows = [{"question": "a", "choices": ["b", "b c"], "answer": 0}]
    (note,) = choices(loaded, questions(written(tmp_path / "q.jsonl", rows))).notes
    assert "'b' begins 'b c'" in note


def test_what_cannot_be_asked_is_one_line_each(cenote: Run, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "one.txt").write_text("a\n")
    (tmp_path / "none.jsonl").write_text("\n")
    text = text_classifier(tmp_path / "text")
    for arguments, message in (
        ((text, "--heads"), "is BertForSequenceClassification, and no decoder"),
        ((text, "--choices", written(tmp_path / "q.jsonl", ASKED)), "and no decoder"),
        ((folder, "--heads", "--concept", tmp_path / "nowhere"), "concept: there is no file"),
        ((folder, "--heads", "--concept", tmp_path / "one.txt"), "expected a word a line, at least 2, got 1"),
        ((folder, "--concept", tmp_path / "one.txt"), "--concept: is a question about heads; give --heads too"),
        ((folder, "--choices", tmp_path / "nowhere"), "choices: there is no file"),
        ((folder, "--choices", tmp_path / "none.jsonl"), "holds no question"),
        ((folder, "--choices", tmp_path / "one.txt", "--heads"), "--heads, --choices: are different questions"),
        ((folder, "texts.csv", "--heads"), "--heads: takes no data, got texts.csv"),
        ((folder, "--masks", tmp_path), "--masks: are of images"),
        ((folder, "texts.csv"), "is LlamaForCausalLM, and no classifier"),
        ((image_classifier(tmp_path / "image"), "--text", "a b"), "takes image; name a folder of images instead"),
    ):
        code, _, err = cenote("explain", *arguments, "--out", tmp_path / "out")
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    for kind, name in ((Heads, "heads"), (Choices, "choices")):
        (tmp_path / f"{name}.json").write_text(json.dumps(files.sealed({})))
        with pytest.raises(InputError, match=f"{name}.json holds no"):
            kind.load(tmp_path)  # type: ignore[attr-defined]
