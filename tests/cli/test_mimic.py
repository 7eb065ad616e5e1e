from pathlib import Path

import pytest
import torch

from cenote.pool.sequence.attentive_mimicking.word_vectors import WordVectors
from tests.cli.program import Run

QUICK = ["--least-count", "10", "--epochs", "30"]
SAID = {"fruit": ("sweet", "ripe", "juicy"), "tool": ("heavy", "steel", "sharp")}
THINGS = {"fruit": ("applin", "berrin", "plumin", "figgin"), "tool": ("hammok", "sawwok", "drillok", "filok")}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Vectors of fruits and tools, which are far apart, and a text about them and two more."""
    g = torch.Generator().manual_seed(0)
    centres = dict(zip(THINGS, torch.randn(2, 6, generator=g), strict=True))
    words, rows, lines = ["the", "was"], [torch.zeros(6)] * 2, []
    for kind, things in THINGS.items():
        words += [*things, *SAID[kind]]
        rows += [centres[kind] + 0.1 * torch.randn(6, generator=g) for _ in (*things, *SAID[kind])]
        lines += [f"The {a} {w} was {b}." for w in things for a in SAID[kind] for b in SAID[kind]] * 2
    lines += ["A juicy quince was sweet.", "The heavy pliers was sharp, 1999.", "A quince!"]
    WordVectors(words, torch.stack(rows)).save(tmp_path / "known.txt")
    (tmp_path / "text.txt").write_text("\n".join(lines), "utf-8")
    return tmp_path / "known.txt", tmp_path / "text.txt"


def test_rare_words_of_a_text_get_vectors(cenote: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    known, out = WordVectors.read(files[0]), tmp_path / "rare.txt"
    code, said, _ = cenote("mimic", *files, "--out", out, *QUICK)
    assert code == 0
    assert "16 vectors of width 6" in said
    assert "3 words, 0 of them from their letters alone" in said
    assert out.read_text("utf-8").startswith("3 6\na ")
    new = WordVectors.read(out)
    assert set(new.words) == {"a", "quince", "pliers"}
    centre = {kind: known.vectors[[known.number[w] for w in things]].mean(0) for kind, things in THINGS.items()}
    for word, near, far in (("quince", "fruit", "tool"), ("pliers", "tool", "fruit")):
        vector = new.vectors[new.number[word]]
        assert (vector - centre[near]).norm() < (vector - centre[far]).norm()


def test_named_words_beside_the_vectors_that_were_there(cenote: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    out, words, model = tmp_path / "all.txt", tmp_path / "words.txt", tmp_path / "model"
    words.write_text("Quince\n\nquince\nnowhere\n", "utf-8")
    both = ["--words", words, "--model", model, "--together", "--out", out]
    code, said, _ = cenote("mimic", *files, *both, *QUICK)
    assert code == 0
    assert "2 words, 1 of them from their letters alone" in said
    first = WordVectors.read(out)
    assert first.words == [*WordVectors.read(files[0]).words, "quince", "nowhere"]
    # the second time nothing is trained
    code, said, _ = cenote("mimic", *files, *both)
    assert code == 0
    assert "not trained again" in said
    assert torch.equal(WordVectors.read(out).vectors, first.vectors)

    other = tmp_path / "other.txt"
    other.write_text("the 1 2\n", "utf-8")
    code, _, error = cenote("mimic", other, files[1], *both)
    assert code == 2
    assert "was trained with other vectors" in error


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--least-count", "5000"], "stands 5000 times"),
        (["--words", "two.txt"], "line 2 of"),
        (["--words", "empty.txt"], "holds no word"),
        (["--words", "absent.txt"], "cannot be read"),
        (["--at-least", "3"], "lacks a vector"),
        (["--combinator", "sum"], "expected 'gated'"),
        (["--out", "absent/rare.txt"], "a folder that exists"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_written(
    cenote: Run, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("quince\nnew york\n", "utf-8")
    Path("empty.txt").write_text("\n", "utf-8")
    before = set(tmp_path.rglob("*"))
    code, _, error = cenote("mimic", *files, "--epochs", "1", *change)
    assert code == 2
    assert told in error
    assert set(tmp_path.rglob("*")) == before


def test_files_that_are_no_vectors_or_no_text_are_named(cenote: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, error = cenote("mimic", files[1], files[1], "--out", tmp_path / "o.txt")
    assert (code, "line 1" in error) == (2, True)
    code, _, error = cenote("mimic", files[0], tmp_path / "none.txt", "--out", tmp_path / "o.txt")
    assert (code, "cannot be read as text" in error) == (2, True)
