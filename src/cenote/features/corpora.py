"""Collections for search: documents, queries, and which answers which, as people have them on disk."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cenote.core import InputError
from cenote.core.files import read_regular
from cenote.features.table import number
from cenote.features.validate import Problems, check_ids

ID_NAMES = ("_id", "id", "docno", "docid", "doc_id", "pid", "qid", "query_id")
TEXT_NAMES = ("text", "contents", "content", "body", "abstract", "query", "question", "passage")
TITLE = "title"
JSONL, TSV = (".jsonl", ".ndjson"), (".tsv", ".txt")
TREC = (".trec", ".xml", ".sgml", ".sgm", ".dat", "")
NAMED = 3

Qrels = Mapping[str, Mapping[str, float]]
"""Name of a query -> name of a document -> gain, above 0 where the document answers."""


class Texts(NamedTuple):
    """Names and texts, in the order of the file."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]


class Judged(NamedTuple):
    """What the judgements leave of a collection.

    `queries`: numbers of those that are asked; `gains`: of each of them, number of a document -> gain, above 0; `notes`: what
    was left out, in words.
    """

    queries: tuple[int, ...]
    gains: tuple[dict[int, float], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """A collection for search.

    Attributes:
        name: for people.
        format: in words.
        documents: names and texts; a title stands before its text.
        queries: those that are asked.
        gains: of each query, number of a document -> gain.
        notes: what was left out.
    """

    name: str
    format: str
    documents: Texts
    queries: Texts
    gains: tuple[dict[int, float], ...]
    notes: tuple[str, ...] = ()


def read_corpus(
    path: str | Path,
    queries: str | Path | None = None,
    qrels: str | Path | None = None,
    *,
    split: str = "test",
    by_position: bool = False,
    skip_bad: bool = False,
) -> Corpus:
    """A whole collection.

    Args:
        path: a BEIR folder (`corpus.jsonl`, `queries.jsonl`, `qrels/SPLIT.tsv`), a folder with TREC's files, or a file of
            documents (JSONL, TSV, TREC's `<doc>`), with `queries` and `qrels` beside it.
        queries: JSONL, TSV or TREC's `<top>`; default: what lies in the folder.
        qrels: lines `query document gain`, with or without TREC's second column; default: what lies in the folder.
        split: of BEIR, which file of `qrels`.
        by_position: the qrels count the queries from 1, and do not name them (Cranfield).
        skip_bad: leave out documents without text, judgements of what is not there, and queries without an answer.

    Raises:
        InputError: naming what cannot be used, before any long work.
    """
    where = Path(path)
    if not where.exists():
        raise InputError(f"corpus: there is no file or folder {where}")
    form, files = _found(where, split)
    files |= {name: Path(given) for name, given in (("queries", queries), ("qrels", qrels)) if given is not None}
    for name, what in (("queries", "with a line per query"), ("qrels", "with lines `query document gain`")):
        if name not in files:
            raise InputError(f"{name}: {where} has none; name a file {what} with --{name}")
    documents, asked = read_texts(files["corpus"], "corpus"), read_texts(files["queries"], "queries")
    if by_position:
        asked = Texts(tuple(str(n) for n in range(1, len(asked.ids) + 1)), asked.texts)
    documents, notes = with_text(documents, "documents", skip_bad)
    asked, more = with_text(asked, "queries", skip_bad)
    found = judged(documents.ids, asked.ids, read_qrels(files["qrels"]), skip_bad)
    kept = Texts(tuple(asked.ids[q] for q in found.queries), tuple(asked.texts[q] for q in found.queries))
    name = where.name or where.resolve().name
    return Corpus(name, form, documents, kept, found.gains, (*notes, *more, *found.notes))


def read_documents(path: str | Path, skip_bad: bool = False) -> Texts:
    """The documents of a collection alone: a file of them, or a folder as for `read_corpus`.

    Raises:
        InputError: naming what cannot be used.
    """
    where = Path(path)
    if not where.exists():
        raise InputError(f"corpus: there is no file or folder {where}")
    return with_text(read_texts(_found(where, "test")[1]["corpus"], "corpus"), "documents", skip_bad)[0]


def judged(ids: Sequence[str], query_ids: Sequence[str], qrels: Qrels, skip_bad: bool = False) -> Judged:
    """Judgements of documents and queries that are there.

    Args:
        ids: of the documents.
        query_ids: of the queries.
        qrels: see `Qrels`.
        skip_bad: leave out what cannot be used.

    Raises:
        InputError: where there are fewer than two documents, judgements name what is not there, or queries have no answer;
            queries of which the judgements say nothing are not asked, and told under `notes`.

    Example:
        >>> judged(["a", "b"], ["x", "y"], {"x": {"b": 2.0, "a": 0.0}}).gains
        ({1: 2.0},)
    """
    if len(ids) < 2:
        raise InputError(f"corpus: holds {len(ids)} document; there is nothing to rank, give at least two")
    place = {name: i for i, name in enumerate(ids)}
    problems, notes = Problems("qrels"), []

    def refuse(kind: str, text: str) -> None:
        if skip_bad:
            notes.append(f"{text}: left out")
        else:
            problems.add(kind, f"{text}; leave them out with --skip-bad")

    strangers = [q for q in qrels if q not in set(query_ids)]
    if strangers:
        told = f"{len(strangers):,} of {len(qrels):,} judged queries {_are(len(strangers))} not among the queries"
        told = f"{told} ({_some(strangers)})"
        if all(q.isdecimal() and 1 <= int(q) <= len(query_ids) for q in qrels):
            # the others would be judged by the answers of other queries, and nobody would see it
            problems.add(
                "query", f"{told}, and all are numbers up to that of the queries: say --by-position where they count"
            )
        else:
            refuse("query", told)
    lines = [(q, d, gain) for q in query_ids for d, gain in qrels.get(q, {}).items()]
    unknown = list(dict.fromkeys(d for _, d, _ in lines if d not in place))
    if unknown:
        judgements = (
            f"{len(unknown):,} of the judged documents {_are(len(unknown))} not in the corpus ({_some(unknown)})"
        )
        refuse("document", judgements)
    unjudged = [q for q in query_ids if not qrels.get(q)]
    gains = {q: {place[d]: float(g) for d, g in qrels.get(q, {}).items() if d in place and g > 0} for q in query_ids}
    unanswered = [q for q in query_ids if qrels.get(q) and not gains[q]]
    if unanswered:
        have = "has" if len(unanswered) == 1 else "have"
        told = f"{len(unanswered):,} of {len(query_ids):,} queries {have} no relevant document ({_some(unanswered)})"
        refuse("answer", told)
    problems.raise_any()
    asked = tuple(i for i, q in enumerate(query_ids) if gains[q])
    if not asked:
        raise InputError(
            f"qrels: none of {len(query_ids):,} queries has a relevant document; do the names belong together?"
        )
    if unjudged:
        notes.append(
            f"the qrels say nothing of {len(unjudged):,} of {len(query_ids):,} queries ({_some(unjudged)}): not asked"
        )
    return Judged(asked, tuple(gains[query_ids[i]] for i in asked), tuple(notes))


def with_text(found: Texts, what: str, skip_bad: bool) -> tuple[Texts, tuple[str, ...]]:
    """Those that hold any text, and what was left out, in words.

    Raises:
        InputError: where there are others, unless they are to be left out.
    """
    empty = [name for name, text in zip(found.ids, found.texts, strict=True) if not text.strip()]
    if not empty:
        return found, ()
    told = (
        f"{len(empty):,} of {len(found.ids):,} {what} {'holds' if len(empty) == 1 else 'hold'} no text ({_some(empty)})"
    )
    if not skip_bad:
        raise InputError(f"{what}: {told}; leave them out with --skip-bad")
    kept = [(name, text) for name, text in zip(found.ids, found.texts, strict=True) if text.strip()]
    if not kept:
        raise InputError(f"{what}: none of {len(found.ids):,} holds any text")
    return Texts(tuple(name for name, _ in kept), tuple(text for _, text in kept)), (f"{told}: left out",)


def read_texts(path: Path, argument: str) -> Texts:
    """Documents or queries of one file: JSONL, TSV (`id text`), or TREC's `<doc>` or `<top>`.

    Raises:
        InputError: where it is none of these, or ids are missing or stand twice.
    """
    text = _text_of(path, argument)
    suffix = path.suffix.lower()
    if suffix in JSONL:
        rows = list(_of_jsonl(path, text, argument))
    elif re.search(r"<(doc|top)>", text, re.IGNORECASE):
        rows = list(_of_trec(text))
    elif suffix in TSV:
        rows = list(_of_lines(path, text, argument))
    else:
        raise InputError(f"{argument}: {path} is neither JSONL, TSV nor a TREC file with <doc> or <top>")
    if not rows:
        raise InputError(f"{argument}: {path} holds nothing")
    problems = Problems(str(path))
    check_ids([name for name, _ in rows], problems)
    problems.raise_any()
    return Texts(tuple(name for name, _ in rows), tuple(content for _, content in rows))


def read_qrels(path: Path) -> dict[str, dict[str, float]]:
    """Judgements, a line each: `query document gain`, or TREC's `query 0 document gain`; a header line is passed over.

    Raises:
        InputError: naming the line that is another, or says another gain of a document than an earlier one.
    """
    found: dict[str, dict[str, float]] = {}
    for line, text in enumerate(_text_of(path, "qrels").splitlines(), 1):
        parts = text.split()
        if not parts:
            continue
        gain = number(parts[-1])
        if line == 1 and gain is None:
            continue
        if len(parts) not in (3, 4) or gain is None:
            raise InputError(f"qrels: {path}, line {line}: expected `query document gain`, got {text[:80]!r}")
        query, document = parts[0], parts[-2]
        if found.setdefault(query, {}).setdefault(document, gain) != gain:
            raise InputError(
                f"qrels: {path}, line {line}: document {document!r} has {gain:g} for query {query!r}, and "
                f"{found[query][document]:g} above; keep one of both"
            )
    if not found:
        raise InputError(f"qrels: {path} holds no judgement; expected lines `query document gain`")
    return found


def _found(where: Path, split: str) -> tuple[str, dict[str, Path]]:
    """The format in words, and the files by what they hold."""
    if where.is_file():
        return "files", {"corpus": where}
    if (where / "corpus.jsonl").is_file():
        files = {"corpus": where / "corpus.jsonl"}
        if (where / "queries.jsonl").is_file():
            files["queries"] = where / "queries.jsonl"
        splits = sorted((where / "qrels").glob("*.tsv"))
        chosen = next(
            (file for file in splits if file.stem == split), splits[0] if len(splits) == 1 and split == "test" else None
        )
        if chosen is None and splits:
            raise InputError(f"split: {where / 'qrels'} has {', '.join(f.stem for f in splits)}; name one with --split")
        return "BEIR folder", files | ({} if chosen is None else {"qrels": chosen})
    files = {}
    for file in sorted(where.iterdir()):
        kind = _kind(file)
        if kind in files:
            raise InputError(
                f"corpus: {files[kind].name} and {file.name} of {where} both hold {kind}; name one of them"
            )
        if kind is not None:
            files[kind] = file
    if "corpus" not in files:
        raise InputError(
            f"corpus: {where} is no BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv), and holds no file with "
            f"TREC's <doc>"
        )
    return "TREC files", files


def _kind(file: Path) -> str | None:
    """What a file of a folder with TREC's files holds."""
    if not file.is_file() or file.name.startswith("."):
        return None
    if "qrel" in file.name.lower():
        return "qrels"
    if file.suffix.lower() not in (*TREC, *TSV):
        return None
    with file.open("rb") as opened:
        head = opened.read(4096).lower()
    return "corpus" if b"<docno>" in head else "queries" if b"<top>" in head else None


def _of_jsonl(path: Path, text: str, argument: str) -> Iterator[tuple[str, str]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{argument}: {path}, line {line}: is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{argument}: {path}, line {line}: expected an object, got {type(row).__name__}")
        name = next((row[key] for key in ID_NAMES if key in row), None)
        body = next((row[key] for key in TEXT_NAMES if key in row), None)
        if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(body, str):
            raise InputError(
                f"{argument}: {path}, line {line}: expected an object with _id (or {', '.join(ID_NAMES[1:4])}) and text, "
                f"got {', '.join(map(str, row)) or 'none'}"
            )
        yield str(name), titled(row.get(TITLE), body)


def _of_lines(path: Path, text: str, argument: str) -> Iterator[tuple[str, str]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        name, tab, body = content.partition("\t")
        if not tab:
            raise InputError(f"{argument}: {path}, line {line}: expected an id, a tab and a text, got {content[:60]!r}")
        yield name.strip(), body.strip()


def _of_trec(text: str) -> Iterator[tuple[str, str]]:
    """Documents, or topics, of which tags are often not closed."""
    for part in re.findall(r"<doc>(.*?)</doc>", text, re.DOTALL | re.IGNORECASE):
        body = _inside(part, "text")
        if body is None:
            body = re.sub(r"<docno>.*?</docno>", "", part, flags=re.DOTALL | re.IGNORECASE)
        yield _plain(_inside(part, "docno") or ""), titled(_inside(part, "title") or _inside(part, "headline"), body)
    for part in re.findall(r"<top>(.*?)</top>", text, re.DOTALL | re.IGNORECASE):
        name, asked = (_behind(part, tag) for tag in ("num", TITLE))
        yield (
            re.sub(r"^number:\s*", "", name, flags=re.IGNORECASE),
            re.sub(r"^topic:\s*", "", asked, flags=re.IGNORECASE),
        )


def titled(title: object, text: str) -> str:
    """A text with its title before it, unless it begins with that already.

    >>> titled("Wings", "Of birds."), titled("Wings ", "wings of birds"), titled(None, "Of  birds")
    ('Wings Of birds.', 'wings of birds', 'Of birds')
    """
    head, body = _plain(title) if isinstance(title, str) else "", _plain(text)
    return body if body.lower().startswith(head.lower()) else f"{head} {body}".strip()


def _plain(text: str) -> str:
    """Without tags, and with single spaces."""
    return " ".join(html.unescape(re.sub(r"</?[a-zA-Z][^<>]{0,80}>", " ", text)).split())


def _inside(part: str, tag: str) -> str | None:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", part, re.DOTALL | re.IGNORECASE)
    return " ".join(found) if found else None


def _behind(part: str, tag: str) -> str:
    found = re.search(rf"<{tag}>([^<]*)", part, re.IGNORECASE)
    return "" if found is None else " ".join(html.unescape(found[1]).split())


def _text_of(path: Path, argument: str) -> str:
    try:
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{argument}: {path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"{argument}: cannot read {path} ({error.strerror or error})") from error


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _some(names: Sequence[str]) -> str:
    """The first three.

    >>> _some(["a", "b"]), _some(["a", "b", "c", "d", "e"])
    ('a, b', 'a, b, c, ...')
    """
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
