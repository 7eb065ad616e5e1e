"""How few vectors will do: a collection's index, reduced in every way, searched and judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import cenote.core.files as files
from cenote.compare.arms import OnShare, unheard
from cenote.compare.engine import CELLS, Measured, prepared
from cenote.compare.engine import measure as measure_arms
from cenote.compare.inference import Measure
from cenote.compare.judge import judge
from cenote.compare.provenance import provenance
from cenote.compare.statistics import Significance
from cenote.compare.units import Units
from cenote.core import Bags, InputError
from cenote.core.requirements import require_at_least
from cenote.features.corpora import Corpus, judged
from cenote.features.vectors import ExactStore, Meta
from cenote.jobs.reduce.arms import BASELINE, FACTORS, arms, families
from cenote.jobs.reduce.encoding import Encoder, directions, encoded, stored
from cenote.jobs.reduce.indexes import Indexes
from cenote.jobs.reduce.measure import METRIC, Bench, jaccard, named_gains
from cenote.jobs.reduce.result import JOB, LOSS, Frontier
from cenote.jobs.reduce.verdict import worded

TOKENS = "tokens"
ENCODING = "encoding"
SEEDS = 3
LOST = 5
GIVEN = "given vectors"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of a collection.

    Attributes:
        methods: `"fast"`, `"all"`, or names; controls are always among them.
        factors: how many times fewer vectors, above 1.
        loss: how much of nDCG@10 may be lost.
        most_bytes: that the index may take; then the best of these is recommended, whatever it loses.
        seeds: how many draws of what draws.
        significance: see `cenote.jobs.probe.compare`.
    """

    methods: str | Sequence[str] = "fast"
    factors: Sequence[float] = FACTORS
    loss: float = LOSS
    most_bytes: int | None = None
    seeds: int = SEEDS
    significance: Significance = "permutation"

    def __post_init__(self) -> None:
        require_at_least(1, seeds=self.seeds)
        require_at_least(0, loss=self.loss)
        families(self.methods, self.factors)


def compare(
    documents: Bags,
    queries: Bags,
    qrels: Mapping[Any, Mapping[Any, float]],
    methods: str | Sequence[str] = "fast",
    factors: Sequence[float] = FACTORS,
    *,
    ids: Sequence[Any] | None = None,
    query_ids: Sequence[Any] | None = None,
    protect: int = 0,
    loss: float = LOSS,
    most_bytes: int | None = None,
    seeds: int = SEEDS,
    out: str | Path | None = None,
    name: str = "collection",
    skip_bad: bool = False,
    significance: Significance = "permutation",
    on_method: OnShare = unheard,
) -> Frontier:
    """Find out how few vectors per document will do.

    Args:
        documents: the vectors of each document's tokens, padding and punctuation left out; they are scaled to norm 1.
        queries: of each query's tokens, likewise.
        qrels: name of a query -> name of a document -> gain, above 0 where it answers.
        methods: `"fast"`, `"all"`, or names of reducers; controls are always among them.
        factors: how many times fewer vectors, above 1.
        ids, query_ids: names; default: their numbers.
        protect: leading vectors of a document, as [CLS], that reductions leave as they are.
        loss: how much of nDCG@10 may be lost.
        most_bytes: that the index may take; then the best of these is recommended, whatever it loses.
        seeds: how many draws of what draws.
        out: folder for finished cells and `comparison.json`; given the same folder again, finished cells are not recomputed.
            `None`: nothing is kept.
        name: of the collection.
        skip_bad: leave out judgements of what is not there, and queries without an answer.
        significance: see `cenote.jobs.probe.compare`.
        on_method: progress: called with an arm's name and the share of its work that is done.

    Returns:
        The `Frontier`: `.verdict` in words, `.table`, `.smallest(loss=.01)`. After Ctrl-C, if all vectors had been measured,
        that of the finished ones, with `complete=False`.

    Raises:
        InputError: for anything that cannot be used, before long work starts.

    Example:
        >>> from cenote.features.hashed_words import HashedWords
        >>> words, texts = HashedWords(), [f"the {a} {b} of it" for a in ("red", "old", "odd") for b in ("cat", "sky", "map")]
        >>> asked = [text.split()[1] for text in texts]
        >>> qrels = {i: {i: 2, j: 1} for i in range(9) for j in range(9) if i // 3 == j // 3 and i != j}
        >>> found = compare(words.documents(texts), words.queries(asked), qrels, ["sequential"], factors=(2,), seeds=1)
        >>> found.baseline, len(found.controls)
        ('unreduced', 4)
    """
    asked = Asked(methods, factors, loss, most_bytes, seeds, significance)
    names = _names(ids, len(documents), "ids")
    asking = _names(query_ids, len(queries), "query_ids")
    known = judged(names, asking, {str(q): {str(d): g for d, g in of.items()} for q, of in qrels.items()}, skip_bad)
    chosen = directions(asking, queries, "queries").select(torch.tensor(known.queries))
    _require_reducible(documents, protect)
    with _folder(out) as folder:
        store = stored(names, documents, folder / TOKENS, Meta(GIVEN, documents.dim))
        bench = Bench(
            store, chosen, tuple(asking[q] for q in known.queries), named_gains(names, known.gains), protect, folder
        )
        return _compared(bench, asked, name, known.notes, "cenote.jobs.reduce.compare", out is not None, on_method)


def compare_corpus(
    corpus: Corpus,
    encoder: Encoder,
    asked: Asked | None = None,
    *,
    out: str | Path | None = None,
    on_method: OnShare = unheard,
) -> Frontier:
    """The same of texts: their vectors are made first, and kept beside the cells.

    Args:
        corpus: see `cenote.features.corpora.read_corpus`.
        encoder: what turns texts into vectors, such as `cenote.models.token_vectors.TokenEncoder`.
        asked: what is compared.
        out: see `compare`.
        on_method: progress; `encoding` is an arm in it.
    """
    asked = asked or Asked()
    ids, count = corpus.documents.ids, len(corpus.documents.ids)
    with _folder(out) as folder:
        store = encoded(corpus.documents, encoder, folder / TOKENS, lambda n: on_method(ENCODING, n / count))
        _require_reducible(store, encoder.protect)
        queries = directions(corpus.queries.ids, encoder.queries(corpus.queries.texts), "queries")
        bench = Bench(store, queries, corpus.queries.ids, named_gains(ids, corpus.gains), encoder.protect, folder)
        called = "cenote.jobs.reduce.compare_corpus"
        return _compared(bench, asked, corpus.name, corpus.notes, called, out is not None, on_method)


def _compared(
    bench: Bench, asked: Asked, name: str, notes: Sequence[str], called: str, keep: bool, on_method: OnShare
) -> Frontier:
    indexes = Indexes(bench, tuple(dict.fromkeys(float(f) for f in asked.factors)))
    made = arms(indexes, families(asked.methods, asked.factors), range(asked.seeds))
    cells = bench.folder / CELLS if keep else None
    measured = measure_arms(made, BASELINE, folder=cells, workers=1, on_share=on_method)
    lengths = bench.lengths()
    found = judge(
        Frontier,
        measured,
        Units(bench.query_ids),
        Measure(METRIC),
        baseline=BASELINE,
        significance=asked.significance,
        provenance=provenance(called, seeds=list(range(asked.seeds)), collection_sha256=bench.fingerprint()),
        dataset={
            "name": name,
            "documents": len(bench.documents),
            "queries": len(bench.query_ids),
            "vectors": bench.documents.vectors,
            "width": bench.documents.meta.width,
            "model": bench.documents.meta.model,
            "median_length": int(lengths.median()),
            "protected": bench.protect,
            "chance": bench.chance(),
        },
        loss=float(asked.loss),
        most_bytes=asked.most_bytes,
        notes=tuple(notes),
    )
    found = _with_cells(worded(_alike(found, measured)), measured)
    if keep:
        found.save(bench.folder)
        if found.complete:
            indexes.remove()
    return found


def _alike(found: Frontier, measured: Measured) -> Frontier:
    first = measured.cells[BASELINE].tensors["first"]
    results = tuple(
        dataclasses.replace(r, alike=round(jaccard(first, measured.cells[r.method].tensors["first"]), 6))
        for r in found.results
    )
    return dataclasses.replace(found, results=results)


def _with_cells(found: Frontier, measured: Measured) -> Frontier:
    """With the queries that lose most by what is recommended."""
    if found.recommended == found.baseline:
        return found
    before, after = (measured.cells[name].scores.mean(0) for name in (BASELINE, found.recommended))
    lost = (before - after).argsort(descending=True, stable=True)[:LOST].tolist()
    names = measured.arms[0].indexes.bench.query_ids  # type: ignore[attr-defined]
    told = tuple(
        (names[i], round(float(before[i]), 6), round(float(after[i]), 6)) for i in lost if before[i] > after[i]
    )
    return dataclasses.replace(found, lost=told)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is None:
        with files.temporary_folder() as folder:
            yield folder
        return
    with prepared(Path(out), JOB) as kept:
        assert kept is not None
        yield kept


def _names(given: Sequence[Any] | None, count: int, argument: str) -> list[str]:
    names = [str(name) for name in (range(count) if given is None else given)]
    if len(names) != count:
        raise InputError(f"{argument}: expected one for each of {count}, got {len(names)}")
    return names


def _require_reducible(documents: Bags | ExactStore, protect: int) -> None:
    lengths = documents.lengths()
    if not len(lengths) or int(lengths.max()) - protect < 2:
        beyond = f" beyond the {protect} that are never reduced" if protect else ""
        raise InputError(
            f"documents: none has two vectors{beyond}; there is nothing to reduce. Is it one vector per document?"
        )
