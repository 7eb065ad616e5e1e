"""`cenote index` and `cenote search` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.program import Run

DOCUMENTS = {
    "moon": "the moon turns around the earth once a month",
    "river": "a river carries water from the hills to the sea",
    "bread": "bread is baked from flour, water and salt",
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"_id": name, "text": text}) for name, text in DOCUMENTS.items()))
    return path


def indexed(cenote: Run, corpus: Path, store: str, *more: object) -> tuple[int, str, str]:
    return cenote("index", corpus, "--model", "hashed-words", "--method", "sequential", "--store", store, *more)


@pytest.mark.parametrize("kind", ["", "exact://", "lancedb://", "qdrant://"])
def test_what_is_indexed_is_found(cenote: Run, corpus: Path, tmp_path: Path, kind: str) -> None:
    if kind.startswith(("lancedb", "qdrant")):
        library = {"lancedb://": "lancedb", "qdrant://": "qdrant_client"}[kind]
        pytest.importorskip(library, reason="cenote[index] is not installed")
    store = f"{kind}{tmp_path / 'store'}"
    code, text, err = indexed(cenote, corpus, store)
    assert code == 0, err
    assert "3 added, 0 were there, 14 vectors of 27; holds 3 documents" in text
    code, text, err = cenote("search", "baking bread with flour", "--store", store, "-k", "2")
    assert code == 0, err
    assert text.split()[1] == "bread"
    assert len(text.splitlines()) == 2
    code, text, _ = cenote("search", "water of the river", "--store", store, "--json")
    told = json.loads(text)
    assert (told["hits"][0]["id"], len(told["hits"]), told["exact"]) == ("river", 3, True)


def test_adding_goes_on_and_recall_is_told(cenote: Run, corpus: Path, tmp_path: Path) -> None:
    store, queries = str(tmp_path / "store"), tmp_path / "queries.tsv"
    queries.write_text("q1\tmoon and earth\nq2\tsalt water\n")
    indexed(cenote, corpus, store)
    with corpus.open("a") as file:
        file.write('\n{"_id": "wind", "text": "wind moves the leaves of trees"}')
    code, text, _ = indexed(cenote, corpus, store, "--queries", queries)
    assert code == 0
    assert "1 added, 3 were there" in text
    assert "the store finds 100.0 % of the true first 10 of 2 queries" in text
    code, text, _ = indexed(cenote, corpus, store, "--json")
    assert (json.loads(text)["added"], json.loads(text)["kept"], json.loads(text)["documents"]) == (0, 4, 4)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--factor", "3"), "holds factor 2.0, not 3.0; name another place"),
        (("--method", "first-k"), "holds method sequential, not first-k"),
        (("--method", "simpool"), "method: simpool does not reduce documents by their vectors alone"),
        (("--factor", "1"), "factor: expected a number above 1, got 1; unreduced documents need no reducer"),
        (("--store", "faiss://here"), "store: expected 'exact', 'lancedb' or 'qdrant', got 'faiss'"),
        (("--store", "exact://"), "store: expected a folder behind exact://"),
    ],
)
def test_another_content_is_refused_in_one_line(
    cenote: Run, corpus: Path, tmp_path: Path, more: tuple[str, str], told: str
) -> None:
    store = str(tmp_path / "store")
    assert indexed(cenote, corpus, store)[0] == 0
    code, _, err = indexed(cenote, corpus, store, *more)
    assert (code, told in err, err.count("\n")) == (2, True, 1), err


def test_searches_that_cannot_be(cenote: Run, corpus: Path, tmp_path: Path) -> None:
    code, _, err = cenote("search", "water", "--store", tmp_path / "nowhere")
    assert (code, "store: there is no index in" in err) == (2, True)
    store = str(tmp_path / "store")
    indexed(cenote, corpus, store)
    code, _, err = cenote("search", " ", "--store", store)
    assert (code, "queries: expected a text" in err) == (2, True)
