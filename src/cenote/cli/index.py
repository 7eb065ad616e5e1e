"""`cenote index`: documents, a model and a reducer -> a store that `cenote search` asks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cenote.cli import encoders, options, stores
from cenote.cli.console import clock, emit, say, sized, talking
from cenote.cli.progress import items_bar

ASKED = 100


def index(
    corpus: Annotated[str, typer.Argument(help="As for cenote reduce: a folder or a file of documents; manuals.")],
    store: stores.Store,
    model: encoders.Model = None,
    method: Annotated[
        str, typer.Option(help="Reducer, see cenote list; unreduced keeps all vectors. cenote reduce says which.")
    ] = "hierarchical",
    factor: Annotated[float | None, typer.Option(help="How many times fewer vectors; default 2.")] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Also say how much of the true first ten the store finds for these.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave documents without text out.")] = False,
    layer: encoders.Layer = None,
    punctuation: encoders.Punctuation = False,
    max_length: options.MaxLength = None,
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    as_json: options.Json = False,
) -> None:
    """Index a collection with fewer vectors per document; killed at any moment, the same command goes on."""
    console = talking(as_json)
    from cenote.features.corpora import read_documents, read_texts
    from cenote.features.manuals import NAME, manuals
    from cenote.jobs.index import index as indexed
    from cenote.jobs.index import recall_of
    from cenote.jobs.index.job import meta_for, sample_of

    embedded = corpus == NAME and not Path(corpus).exists()
    texts = manuals().documents if embedded else read_documents(corpus, skip_bad)
    asked = None if queries is None else read_texts(queries, "queries")
    with console.status(Text("loading the model")):
        encoder = encoders.encoder_of(
            model or encoders.default_model(), layer, punctuation, max_length,
            revision=revision, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
        )  # fmt: skip
    factor = factor if factor is not None else 1.0 if method == "unreduced" else 2.0
    opened = stores.opened(store, meta_for(encoder, method, factor))
    count = len(texts.ids)
    with items_bar(console, count) as on_items:
        done = indexed(texts, encoder, opened, lambda n: on_items("indexing", n, f"{n:,} of {count:,}"))
    fewer = f", {done.after:,} vectors of {done.before:,}" if done.added else ""
    say(
        console,
        f"{done.added:,} added, {done.kept:,} were there{fewer}; holds {done.documents:,} documents, "
        f"{sized(done.bytes)} on disk",
    )
    if done.added:
        say(console, f"model {clock(done.encoding)}, reduction {clock(done.reducing)}, store {clock(done.adding)}")
    found = None
    if asked is not None:
        found = recall_of(opened, sample_of(asked, encoder, ASKED))
        say(
            console,
            f"the store finds {100 * found.recall:.1f} % of the true first {found.k} of {found.queries} queries, in "
            f"{found.ms:.0f} ms each",
        )
    if as_json:
        emit({**dataclasses.asdict(done), "store": store, "recall": None if found is None else found._asdict()})
