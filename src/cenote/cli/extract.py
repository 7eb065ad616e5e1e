"""`cenote extract`: raw files and a model -> a feature store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cenote.cli import options
from cenote.cli.console import clock, emit, say, sized, talking
from cenote.cli.engines import extractor, known_engine
from cenote.cli.tokens import extracting, listed, tell


def extract(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of images or sounds, or a txt, CSV, JSONL, Parquet file, or a saved datasets folder."
        ),
    ],
    backbone: Annotated[str, typer.Option(help="Folder of a saved model, or a model's name on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder of the store; the same command again goes on.")],
    layers: Annotated[str, typer.Option(help="last, all, or numbers: 0 (the embeddings), 4-6, -4:, ...")] = "last",
    labels: Annotated[Path | None, typer.Option(help="CSV with the labels, matched by id.")] = None,
    id_column: options.Id = None,
    kind: options.Kind = None,
    column: options.Column = None,
    names: options.Names = None,
    limit: options.Limit = None,
    dtype: options.Dtype = "float16",
    pool_at_extract: Annotated[
        str | None, typer.Option("--pool-at-extract", help="Keep one vector per item: mean, max, cls, ...")
    ] = None,
    batch: options.Batch = 32,
    max_item_size: options.MaxItemSize = options.DEFAULT_SIZE,
    items_per_shard: Annotated[int | None, typer.Option(min=1, help="Default: about 64 MB a shard.")] = None,
    skip_bad: options.SkipBad = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print items, tokens, bytes and time from a timed sample; write nothing.")
    ] = False,
    device: options.Device = "cpu",
    precision: options.Precision = "float32",
    max_length: options.MaxLength = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    engine: options.Engine = "local",
    address: options.Address = "auto",
    as_json: options.Json = False,
) -> None:
    """Turn raw images, sound or text into a store of token features."""
    from cenote.jobs.extract import ModelSpec, Options, estimate
    from cenote.jobs.extract import extract as extracted

    known_engine(engine)
    console = talking(as_json)
    items = listed(
        data, console, kind=kind, labels=labels, column=column, names=names, id_column=id_column, limit=limit,
        max_item_size=max_item_size,
    )  # fmt: skip
    spec = ModelSpec(backbone, items.kind, revision, device, precision, max_length, trust_remote_code, allow_pickle)
    wanted = Options(layers, dtype, pool_at_extract, batch, items_per_shard, skip_bad)  # type: ignore[arg-type]
    if dry_run:
        with console.status("timing a sample"):
            found = estimate(items, spec, out, wanted)
        say(
            console,
            f"{found.items:,} items, {found.tokens:,} tokens, {sized(found.bytes)} in {found.shards} shards, "
            f"about {clock(found.seconds)} on this machine ({found.sampled} items timed); {sized(found.free_bytes)} are free",
        )
        if as_json:
            emit(dataclasses.asdict(found))
        return
    with extracting(console, len(items), out) as on_progress:
        done = extracted(
            items,
            spec,
            out,
            wanted,
            engine=extractor(engine, address),
            on_progress=on_progress,
            on_message=lambda text: say(console, text),
        )
    tell(done, console)
    if as_json:
        shards = done.manifest.shards or ()
        totals = {name: sum(getattr(s, name) for s in shards) for name in ("rows", "tokens", "bytes", "shortened")}
        emit(
            {
                "store": done.store,
                "items": totals.pop("rows"),
                **totals,
                "shards_made": done.computed,
                "shards_kept": done.kept,
                "seconds": done.seconds,
                "skipped": dict(done.skipped),
            }
        )
