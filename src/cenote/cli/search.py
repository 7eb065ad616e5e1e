"""`cenote search`: ask a store that `cenote index` made."""

from __future__ import annotations

from typing import Annotated

import typer

from cenote.cli import encoders, options, stores
from cenote.cli.console import emit, say, talking


def search(
    query: Annotated[str, typer.Argument(help="What is asked.")],
    store: stores.Store,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many documents.")] = 10,
    model: encoders.Model = None,
    device: options.Device = "cpu",
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    as_json: options.Json = False,
) -> None:
    """Find documents; the store names the model, whose weights must be those that it was made with."""
    console = talking(as_json)
    from cenote.jobs.index import search as searched

    opened = stores.opened(store)
    held = opened.meta
    encoder = encoders.encoder_of(
        model or held.model, held.layer, held.punctuation, held.max_length,
        revision=revision, device=device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
    )  # fmt: skip
    hits = searched([query], encoder, opened, k)
    for name, score in zip(hits.ids[0], hits.scores[0].tolist(), strict=True):
        say(console, f"{score:8.3f}  {name}")
    if not hits.exact:
        say(console, "scores are exact; a document that the store did not propose may be missing")
    if as_json:
        found = [{"id": n, "score": s} for n, s in zip(hits.ids[0], hits.scores[0].tolist(), strict=True)]
        emit({"query": query, "store": store, "exact": hits.exact, "hits": found})
