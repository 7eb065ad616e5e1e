"""`cenote explain` from its arguments to page, JSON and heat map."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from cenote.cli.explain import heat, table_of
from cenote.jobs.explain import Audit
from cenote.jobs.explain.one import Looked
from tests.cli.program import Run
from tests.jobs.explain.models import sentences, text_classifier

QUICK = ("--methods", "last-layer-attention,mean-attention")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_classifier(tmp_path_factory.mktemp("model"))


def test_the_embedded_digits_need_no_argument_but_where_to(cenote: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, _ = cenote("explain", "--limit", "12", *QUICK, "--out", out)
    assert code == 0
    assert "digits: faithfulness on 12 images" in text
    assert "random °" in text
    assert (out / "report.html").stat().st_size > 10_000
    found = Audit.load(out)
    assert found.sentence in " ".join(text.split())
    code, text, said = cenote("explain", "--limit", "12", *QUICK, "--out", out, "--json")
    told = json.loads(text)
    assert code == 0
    assert told["sentence"] == found.sentence
    assert told["report"] == str(out / "report.html")
    assert "digits: faithfulness" in said
    (out / "report.html").unlink()
    assert cenote("report", out)[0] == 0
    assert "audit of explanations" in (out / "report.html").read_text()


def test_a_table_of_texts_then_one_text_by_what_it_recommends(cenote: Run, classifier: Path, tmp_path: Path) -> None:
    table, out = sentences(tmp_path / "texts.csv"), tmp_path / "out"
    options = ("--text-column", "text", "--label", "mood", *QUICK, "--out", out)
    code, text, _ = cenote("explain", classifier, table, *options)
    assert code == 0
    assert "16 items" in text
    found = Audit.load(out)
    assert found.dataset["accuracy"] is not None
    assert "words, [MASK]" in text
    code, text, _ = cenote("explain", classifier, "--text", "a b c d", "--out", out)
    assert code == 0
    assert f"({found.recommended})." in text
    code, text, _ = cenote("explain", classifier, "--text", "a b c d", "--methods", "mean-attention", "--json")
    (one,) = json.loads(text)["explanations"]
    assert one["words"] == ["a", "b", "c", "d"]
    assert len(one["scores"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text-column", "review"], "has no column 'review'; its columns are text, mood"),
        (["--label", "stars"], "--label: there is no column 'stars'"),
        (["--target", "angry"], "target: the model has no class 'angry'; it has sad, glad, plain"),
        (["--methods", "magic"], "no method is called 'magic'"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line_and_exit_code_2(
    cenote: Run, classifier: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    table = sentences(tmp_path / "texts.csv")
    code, _, err = cenote("explain", classifier, table, *QUICK, *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_without_data_or_with_too_much_it_says_what_to_give(cenote: Run, classifier: Path) -> None:
    assert "name a table of texts" in cenote("explain", classifier)[2]
    assert "the embedded digits have their own items" in cenote("explain", "digits", "--text", "a b")[2]
    assert "text: is empty; leave it out" in cenote("explain", classifier, "--text", " ")[2]


def test_words_are_coloured_by_what_they_speak_for() -> None:
    drawn = heat(Looked("m", "good", 0.9, ("lovely", "thin", "the"), (2.0, -1.0, 0.0)))
    assert drawn.plain == "lovely thin the "
    lovely, thin, the = (str(span.style) for span in drawn.spans)
    assert lovely == "black on rgb(31,145,136)"
    assert the == "black on rgb(255,255,255)"
    assert thin not in (lovely, the)


def test_the_table_fits_terminals_of_all_widths(cenote: Run, tmp_path: Path) -> None:
    cenote("explain", "--limit", "12", *QUICK, "--out", tmp_path)
    found = Audit.load(tmp_path)
    for width in (40, 60, 80, 100, 160):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table_of(found, width))
        for line in console.export_text().splitlines():
            assert len(line) <= width
            assert "…" not in line


PROGRAM = "import sys; sys.argv = ['cenote', *sys.argv[1:]]; from cenote.cli import main; main()"


def finished(out: Path) -> list[Path]:
    return sorted((out / "cells").glob("*.safetensors"))


def test_a_killed_audit_goes_on_and_ends_with_the_same_page(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["explain", "--limit", "20", *QUICK]

    def start(out: Path) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", PROGRAM, *command, "--out", str(out)]
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(whole).wait(timeout=300) == 0
    run, deadline = start(killed), time.monotonic() + 300
    while not finished(killed) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = {p: p.stat().st_mtime_ns for p in finished(killed)}
    assert 0 < len(kept) < len(finished(whole))
    assert start(killed).wait(timeout=300) == 0
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    assert _without_times(Audit.load(killed)) == _without_times(Audit.load(whole))
    assert (killed / "report.html").is_file()


def _without_times(found: Audit) -> dict[str, object]:
    told = json.loads(found.to_json())
    for result in told["results"]:
        result["seconds"] = result["ms"] = 0.0
    # which is cheapest hangs on measured times
    for name in ("provenance", "pareto", "recommended", "reason", "sentence"):
        told.pop(name)
    return told
