"""`cenote reduce` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cenote.features.manuals import manuals
from cenote.jobs.reduce import Frontier
from tests.cli.program import Run

QUICK = ("--model", "hashed-words", "--methods", "sequential", "--factors", "4", "--seeds", "1")


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """Some pages of the embedded manuals, as people have collections on disk."""
    corpus, folder = manuals(queries=12), tmp_path / "beir"
    answers = sorted({d for of in corpus.gains for d in of})
    kept = [corpus.documents.ids[d] for d in answers]
    (folder / "qrels").mkdir(parents=True)
    for name, ids, texts in (
        ("corpus", kept, [corpus.documents.texts[d] for d in answers]),
        ("queries", corpus.queries.ids, corpus.queries.texts),
    ):
        rows = [json.dumps({"_id": i, "title": "", "text": t}) for i, t in zip(ids, texts, strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    lines = [
        f"{q}\t{corpus.documents.ids[d]}\t{g:g}"
        for q, of in zip(corpus.queries.ids, corpus.gains, strict=True)
        for d, g in of.items()
    ]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines))
    return folder


def test_a_folder_of_beir(cenote: Run, beir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = cenote("reduce", beir, *QUICK, "--out", out)
    assert code == 0, err
    found = Frontier.load(out)
    assert "12 queries" in text
    assert "sequential x4" in text
    assert f"use {found.recommended}: {found.reason}" in text
    page = (out / "report.html").read_text()
    for part in ("how few vectors will do", "bytes on disk (logarithmic)", "take this" if found.lost else "control"):
        assert part in page
    for forbidden in ("http://", "https://", "<script"):
        assert forbidden not in page
    before = page
    code, _, _ = cenote("report", out)
    assert (code, (out / "report.html").read_text()) == (0, before)


def test_json_is_for_machines(cenote: Run, beir: Path, tmp_path: Path) -> None:
    code, text, err = cenote("reduce", beir, *QUICK, "--out", tmp_path / "out", "--json", "--bytes", "100MB")
    assert code == 0
    told = json.loads(text)
    assert told["verdict"] == told["sentence"]
    assert told["most_bytes"] == 100_000_000
    assert {r["method"] for r in told["results"]} >= {"unreduced", "sequential x4", "first-k x4", "random-drop x4"}
    assert "use unreduced" in err
    assert told["sentence"].startswith("Keep all vectors: they take ")


def test_a_dry_run_writes_nothing(cenote: Run, beir: Path, tmp_path: Path) -> None:
    code, text, _ = cenote("reduce", beir, *QUICK, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "7 indexes of" in text
    assert "documents timed" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere",), "corpus: there is no file or folder nowhere"),
        (("--factors", "two"), "--factors: expected numbers separated by commas, such as 2,3,4, got 'two'"),
        (("--factors", "1"), "factors: expected numbers above 1"),
        (("--methods", "simpool"), "methods: simpool does not reduce documents"),
        (("--bytes", "many"), "--bytes: expected a size such as 500MB"),
        (("--bytes", "1MB", "--loss", "0.1"), "--loss, --bytes: are two questions; give one of them"),
        (("--queries", "q.tsv"), "corpus: the embedded manuals have their own queries"),
    ],
)
def test_wrong_input_is_one_line(cenote: Run, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    quick = dict(zip(QUICK[::2], QUICK[1::2], strict=True)) | dict(zip(arguments[::2], arguments[1::2], strict=False))
    given = [
        *arguments[: len(arguments) % 2],
        *(word for pair in quick.items() for word in pair if pair[0].startswith("--")),
    ]
    code, _, err = cenote("reduce", *given, "--out", tmp_path / "out")
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_collection_of_ones_own_needs_a_model(cenote: Run, beir: Path, tmp_path: Path) -> None:
    code, _, err = cenote("reduce", beir, "--out", tmp_path / "out")
    assert code == 2
    assert "--model: name the text model whose vectors are searched" in err
    (beir / "corpus.jsonl").write_text('{"_id": "a", "text": " "}\n{"_id": "b", "text": "b"}')
    code, _, err = cenote("reduce", beir, *QUICK, "--out", tmp_path / "out")
    assert (code, "documents: 1 of 2 documents holds no text (a); leave them out with --skip-bad" in err) == (2, True)


def test_features_that_are_there_already(cenote: Run, beir: Path, tmp_path: Path) -> None:
    """Token stores of documents and queries, as `cenote extract` writes them."""
    pytest.importorskip("transformers", reason="cenote[models] is not installed")
    from tests import tiny

    model = tiny.bert(tmp_path / "bert")
    for name in ("corpus", "queries"):
        rows = [json.loads(line) for line in (beir / f"{name}.jsonl").read_text().splitlines()]
        table = tmp_path / f"{name}.jsonl"
        table.write_text("\n".join(json.dumps({"id": r["_id"], "text": " ".join(r["text"][:24])}) for r in rows))
        code, _, err = cenote("extract", table, "--backbone", model, "--out", tmp_path / name)
        assert code == 0, err
    command = ("reduce", tmp_path / "corpus", *QUICK[2:], "--out", tmp_path / "out")
    judged = ("--qrels", beir / "qrels" / "test.tsv")
    code, _, err = cenote(*command, "--queries", tmp_path / "queries", *judged)
    assert code == 0, err
    found = Frontier.load(tmp_path / "out")
    assert (found.dataset["queries"], found.dataset["protected"], found.dataset["width"]) == (12, 1, 32)
    for more, told in (
        (judged, "--queries: the documents are a feature store; name that of the queries"),
        (("--queries", tmp_path / "queries"), "--qrels: name a file with lines"),
    ):
        code, _, err = cenote(*command, *more)
        assert (code, told in err) == (2, True), err
