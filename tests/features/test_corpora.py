import json
from pathlib import Path

import pytest

from cenote.core import InputError
from cenote.features.corpora import judged, read_corpus, read_documents, read_qrels

DOCUMENTS = [
    {"_id": "d1", "title": "Wings", "text": "wings lift"},
    {"_id": "d2", "title": "Heat", "text": "plates of metal"},
    {"_id": "d3", "title": "", "text": "flow past a plate"},
]
QUERIES = [{"_id": "q1", "text": "what lifts?"}, {"_id": "q2", "text": "hot plates"}, {"_id": "q9", "text": "trained"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td2\t1\nq2\td3\t0\n"


def lines(rows: list[dict[str, str]]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(lines(DOCUMENTS))
    (folder / "queries.jsonl").write_text(lines(QUERIES))
    (folder / "qrels" / "test.tsv").write_text(QRELS)
    return folder


def trec(folder: Path, numbers: tuple[str, ...] = ("301", "302"), qrels: str = "301 0 A1 1\n302 0 A2 2\n") -> Path:
    folder.mkdir()
    (folder / "docs.xml").write_text(
        "<doc>\n<docno> A1 </docno>\n<title>on wings</title>\n<text>on wings\nthat lift &amp; turn</text></doc>\n"
        "<DOC><DOCNO>A2</DOCNO><HEADLINE>Heat</HEADLINE><TEXT>of <b>plates</b></TEXT><TEXT>and rods</TEXT></DOC>\n"
    )
    topics = [f"<top><num> Number: {n}\n<title> Topic: about {n}\n<desc> more\n</top>" for n in numbers]
    (folder / "topics.trec").write_text("\n".join(topics))
    (folder / "qrels.txt").write_text(qrels)
    return folder


def test_beir(beir: Path) -> None:
    corpus = read_corpus(beir)
    assert (corpus.name, corpus.format) == ("beir", "BEIR folder")
    assert corpus.documents.ids == ("d1", "d2", "d3")
    # a title is not said twice
    assert corpus.documents.texts == ("wings lift", "Heat plates of metal", "flow past a plate")
    assert corpus.queries == (("q1", "q2"), ("what lifts?", "hot plates"))
    assert corpus.gains == ({0: 2.0}, {1: 1.0})
    assert corpus.notes == ("the qrels say nothing of 1 of 3 queries (q9): not asked",)
    assert read_documents(beir) == corpus.documents


def test_splits_of_beir(beir: Path) -> None:
    (beir / "qrels" / "dev.tsv").write_text("q9\td3\t1\n")
    assert read_corpus(beir, split="dev").queries.ids == ("q9",)
    with pytest.raises(InputError, match=r"split: .* has dev, test; name one with --split"):
        read_corpus(beir, split="train")


def test_trec(tmp_path: Path) -> None:
    corpus = read_corpus(trec(tmp_path / "trec"))
    assert corpus.documents == (("A1", "A2"), ("on wings that lift & turn", "Heat of plates and rods"))
    assert corpus.queries == (("301", "302"), ("about 301", "about 302"))
    assert corpus.gains == ({0: 1.0}, {1: 2.0})


def test_files_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(lines([{"id": "a", "contents": "one"}, {"id": "b", "contents": "two"}]))
    (tmp_path / "q.tsv").write_text("x\tfirst?\n")
    (tmp_path / "judged").write_text("x 0 a 1\nx 0 b -1\n")
    corpus = read_corpus(tmp_path / "c.jsonl", tmp_path / "q.tsv", tmp_path / "judged")
    assert (corpus.documents.texts, corpus.queries.texts, corpus.gains) == (("one", "two"), ("first?",), ({0: 1.0},))


def test_judgements_that_count_the_queries(tmp_path: Path) -> None:
    """As those of Cranfield: its queries are called 1, 2, 4, 8, ..., and judged as 1, 2, 3, 4, ..."""
    folder = trec(tmp_path / "cran", ("1", "4"), "1 0 A1 1\n2 0 A2 1\n")
    for skip_bad in (False, True):
        with pytest.raises(
            InputError, match=r"queries \(2\), and all are numbers .*: say --by-position where they count"
        ):
            read_corpus(folder, skip_bad=skip_bad)
    corpus = read_corpus(folder, by_position=True)
    assert (corpus.queries, corpus.gains) == ((("1", "2"), ("about 1", "about 4")), ({0: 1.0}, {1: 1.0}))


IDS = [f"d{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("qrels", "told"),
    [
        (
            {"q": dict.fromkeys(["d1", "x1", "x2", "x3", "x4"], 1)},
            "4 of the judged documents are not in the corpus (x1, x2, x3, ...)",
        ),
        ({"q": {"d1": 1}, "r": {"d1": 1}}, "1 of 2 judged queries is not among the queries (r)"),
        ({"q": {"d1": 1}, "p": {"d1": 0, "d2": -1}}, "1 of 2 queries has no relevant document (p)"),
    ],
)
def test_judgements_that_fit_nothing(qrels: dict[str, dict[str, float]], told: str) -> None:
    with pytest.raises(InputError) as error:
        judged(IDS, ["q", "p"], qrels)
    assert str(error.value) == f"qrels: {told}; leave them out with --skip-bad"
    found = judged(IDS, ["q", "p"], qrels, skip_bad=True)
    assert (found.queries, found.gains) == ((0,), ({1: 1.0},))
    assert f"{told}: left out" in found.notes


def test_nothing_to_rank() -> None:
    with pytest.raises(InputError, match="corpus: holds 1 document; there is nothing to rank"):
        judged(["d"], ["q"], {"q": {"d": 1}})
    with pytest.raises(InputError, match="none of 1 queries has a relevant document"):
        judged(IDS, ["q"], {"q": {"x": 1}}, skip_bad=True)


def test_documents_without_text(beir: Path) -> None:
    (beir / "corpus.jsonl").write_text(lines([*DOCUMENTS, {"_id": "d4", "title": "", "text": " "}]))
    with pytest.raises(InputError, match=r"documents: 1 of 4 documents holds no text \(d4\); leave them out"):
        read_corpus(beir)
    corpus = read_corpus(beir, skip_bad=True)
    assert corpus.documents.ids == ("d1", "d2", "d3")
    assert corpus.notes[0] == "1 of 4 documents holds no text (d4): left out"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{\n", "line 1: is no JSON"),
        ("[1]\n", "line 1: expected an object, got list"),
        ('{"title": "x"}\n', "line 1: expected an object with _id .* got title"),
        ('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n', "id 'a' stands 2 times"),
        ("\n", "holds nothing"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(InputError, match=told):
        read_documents(tmp_path / "c.jsonl")


def test_what_is_missing_is_named(tmp_path: Path, beir: Path) -> None:
    with pytest.raises(InputError, match="corpus: there is no file or folder"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is no BEIR folder \(corpus.jsonl"):
        read_corpus(tmp_path)
    with pytest.raises(InputError, match=r"queries: .* has none; name a file with a line per query"):
        read_corpus(beir / "corpus.jsonl")
    with pytest.raises(InputError, match="qrels: cannot read"):
        read_corpus(beir, qrels=tmp_path / "nowhere")
    with pytest.raises(InputError, match="is neither JSONL, TSV nor a TREC file"):
        read_corpus(beir, queries=Path(__file__).parents[2] / "LICENSE")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("q d 1\nq d 2\n", "line 2: document 'd' has 2 for query 'q', and 1 above"),
        ("q 0 d 1\nq d\n", "line 2: expected `query document gain`, got 'q d'"),
        ("query-id corpus-id score\n", "holds no judgement"),
    ],
)
def test_judgements_that_cannot_be_read(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "qrels").write_text(content)
    with pytest.raises(InputError, match=told):
        read_qrels(tmp_path / "qrels")
    (tmp_path / "qrels").write_text("q d 1\nq d 1\n")
    assert read_qrels(tmp_path / "qrels") == {"q": {"d": 1.0}}
