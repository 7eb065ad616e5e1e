"""`cenote mix` from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cenote.cli.mix import table_of
from cenote.jobs.mix import PolicyFrontier, measure
from tests import tiny
from tests.cli.program import Run
from tests.jobs.mix import decoders
from tests.jobs.mix.planted import Made, compared, first

pytest.importorskip("transformers", reason="cenote[models] is not installed")
QUICK = ("--methods", "h2o", "--budgets", "12", "--facts", "2", "--length", "56")


@pytest.fixture(scope="module", autouse=True)
def one_text() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PASSAGES", 1), ("TRIES", 1), ("STRETCH", 8)):
            patch.setattr(measure, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder, an encoder, and a file of texts."""
    top = tmp_path_factory.mktemp("mix")
    decoders.saved(top / "llama")
    tiny.bert(top / "bert")
    (top / "texts.txt").write_text("\n\n".join(decoders.texts()), "utf-8")
    (top / "empty.txt").write_text("\n\n", "utf-8")
    (top / "short.txt").write_text("The flow separates.", "utf-8")
    (top / "latin.txt").write_bytes("é".encode("latin-1"))
    return top


def test_a_decoder_of_ones_own(cenote: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = cenote("mix", folder / "llama", folder / "texts.txt", *QUICK, "--out", out)
    assert code == 0, err
    found = PolicyFrontier.load(out)
    for part in (
        "6 texts",
        "sink-window 12 °",
        "oracle-top-k 12 ^",
        "forgets",
        "keeps all",
        f"use {found.recommended}",
    ):
        assert part in text, part
    page = (out / "report.html").read_text()
    for part in (
        "Policies that read fewer keys",
        "Policies that forget keys",
        "is lost for ever",
        "Facts by depth",
        "times the exact path",
    ):
        assert part in page, part
    forgets = page.partition("Policies that forget keys")[2].partition("</section>")[0]
    assert "h2o 12" in forgets
    assert "sink-window 12" not in forgets
    for forbidden in ("http://", "https://", "<script"):
        assert forbidden not in page
    code, _, _ = cenote("report", out)
    assert (code, (out / "report.html").read_text()) == (0, page)
    # found again, and told to machines
    code, text, err = cenote("mix", folder / "llama", folder / "texts.txt", *QUICK, "--out", out, "--json")
    assert code == 0, err
    told = json.loads(text)
    assert told["verdict"] == told["sentence"] == found.sentence
    assert [r["seconds"] for r in told["results"]] == [r.seconds for r in found.results]


def test_a_dry_run_writes_nothing(cenote: Run, folder: Path, tmp_path: Path) -> None:
    code, text, err = cenote(
        "mix", folder / "llama", folder / "texts.txt", *QUICK, "--out", tmp_path / "out", "--dry-run"
    )
    assert code == 0, err
    assert "5 arms on 2 facts in 1 context and 1 text of 56 tokens; about" in text
    assert "h2o 12" in text
    assert not (tmp_path / "out").exists()


def test_without_arguments_it_is_the_embedded_decoder(cenote: Run, tmp_path: Path) -> None:
    code, text, err = cenote("mix", "--methods", "h2o", "--out", tmp_path / "out", "--dry-run")
    assert code == 0, err
    assert "tiny-decoder: 32 texts" in text
    assert "13 arms on 160 facts in 20 contexts and 1 text of 280 tokens" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere", "texts.txt"), "model: "),
        (("bert", "texts.txt"), "and no decoder (AutoModelForCausalLM)"),
        (("llama",), "texts: name a file of prose"),
        (("llama", "nowhere.txt"), "texts: there is no file"),
        (("llama", "empty.txt"), "empty.txt is empty"),
        (("llama", "latin.txt"), "is no UTF-8 text"),
        (("llama", "short.txt"), "texts: 2 facts in contexts of 56 tokens take about"),
        (("llama", "texts.txt", "--length", "400"), "and the model has 160 positions"),
        (("llama", "texts.txt", "--budgets", "0"), "budget: expected at least 1, got 0"),
        (("llama", "texts.txt", "--budgets", "56"), "are all of them"),
        (("llama", "texts.txt", "--budgets", "few"), "--budgets: expected whole numbers"),
        (("llama", "texts.txt", "--methods", "nearest"), "methods: there is no policy 'nearest'"),
    ],
)
def test_wrong_input_is_one_line(
    cenote: Run, folder: Path, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    given = [folder / word if word[0] != "-" and not word[0].isdigit() else word for word in arguments]
    options = arguments.index("--" + arguments[-2][2:]) if len(arguments) > 2 else len(arguments)
    words = [*given[:options], *QUICK, *arguments[options:]]
    code, _, err = cenote("mix", *words, "--out", tmp_path / "out")
    assert (code, told in err) == (2, True), err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--budgets", "0"), "budget: expected at least 1, got 0"),
        (("--budgets", "280"), "budget: 280 keys of a context of 280 tokens are all of them"),
        (("--budgets", "64", "--length", "64"), "budget: 64 keys of a context of 64 tokens are all of them"),
        (("--budgets", "6"), "random-keys 6: budget: 6 keys leave no room"),
        (("--methods", "quest", "--budgets", "20"), "quest 20: budget: expected a multiple of the 16 tokens"),
    ],
)
def test_budgets_are_checked_before_a_model_is_loaded(
    cenote: Run, tmp_path: Path, arguments: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("cenote.cli.mix._embedded", never)
    code, _, err = cenote("mix", *arguments, "--out", tmp_path / "out")
    assert (code, told in err) == (2, True), err


def test_a_difference_that_rounds_to_nothing_has_no_minus() -> None:
    found = compared({"dense": Made(first(130, 300)), "h2o 32": Made(first(129, 300))}, ["h2o"], (32,), 300)
    (column,) = (c for c in table_of(found, 200).columns if c.header == "vs dense")
    assert "-0" not in [str(cell) for cell in column.cells]
    assert "+0" in [str(cell) for cell in column.cells]


def test_an_interrupted_run_says_so(cenote: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cenote.jobs.mix.arms import Read

    whole, done = Read.run, []

    def interrupted(arm: Read, *given: object) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(arm.name)
        return whole(arm, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Read, "run", interrupted)
    code, _, err = cenote("mix", folder / "llama", folder / "texts.txt", *QUICK, "--out", tmp_path / "out")
    assert code == 130
    assert "run the same command again to go on" in err
    assert not PolicyFrontier.load(tmp_path / "out").complete
