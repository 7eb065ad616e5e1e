"""`cenote extract`: raw files and a model -> a feature store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from cenote.cli.console import say
from cenote.core import InputError

if TYPE_CHECKING:
    from cenote.features.raw import RawItems
    from cenote.jobs.extract import Extracted, ModelSpec, Options, Progress
    from cenote.models import Layout

LISTED = 20
ENGINES = ("local", "ray")

Backbone = Annotated[str, typer.Option(help="Folder of a saved model, or a model's name on the hub.")]
Layers = Annotated[str, typer.Option(help="last, all, or numbers: 0 (the embeddings), 4-6, -4:, ...")]
Kind = Annotated[str | None, typer.Option(help="image, audio or text, where folder or model hold several.")]
Column = Annotated[str | None, typer.Option(help="Of a table: the column with the text, image or sound.")]
Names = Annotated[
    str | None, typer.Option(help="Names of the columns, of CSV files without a header line: text,label.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many items, the first ones.")]
Dtype = Annotated[str, typer.Option(help="Stored numbers: float16, bfloat16 or float32.")]
Batch = Annotated[int, typer.Option(min=1, help="Items in one call of the model.")]
ItemsPerShard = Annotated[int | None, typer.Option(min=1, help="Default: about 64 MB a shard.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable items out, and list them.")]
Pool = Annotated[str | None, typer.Option("--pool-at-extract", help="Keep one vector per item: mean, max, cls, ...")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, typer.Option(help="The model computes in float32, bfloat16 or float16.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Cut texts at so many tokens.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that lies with the model.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also take weights that are not safetensors.")]
EngineName = Annotated[str, typer.Option(help="local, or ray: on an existing cluster.")]
Address = Annotated[str, typer.Option(help="Of the Ray cluster; auto: the one that this machine belongs to.")]


def extract(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of images or sounds, or a txt, CSV, JSONL, Parquet file, or a saved datasets folder."
        ),
    ],
    backbone: Backbone,
    out: Annotated[Path, typer.Option(help="Folder of the store; the same command again goes on.")],
    layers: Layers = "last",
    labels: Annotated[Path | None, typer.Option(help="CSV with the labels, matched by id.")] = None,
    id_column: Annotated[str | None, typer.Option("--id", help="Column with the items' names.")] = None,
    kind: Kind = None,
    column: Column = None,
    names: Names = None,
    limit: Limit = None,
    dtype: Dtype = "float16",
    pool_at_extract: Pool = None,
    batch: Batch = 32,
    items_per_shard: ItemsPerShard = None,
    skip_bad: SkipBad = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print items, tokens, bytes and time from a timed sample; write nothing.")
    ] = False,
    device: Device = "cpu",
    precision: Precision = "float32",
    max_length: MaxLength = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    engine: EngineName = "local",
    address: Address = "auto",
) -> None:
    """Turn raw images, sound or text into a store of token features."""
    from cenote.features.raw import open_raw
    from cenote.jobs.extract import ModelSpec, Options, estimate

    known_engine(engine)
    console = Console()
    with console.status(Text(f"listing {data}")):
        items = open_raw(
            data, kind=kind, labels=labels, column=column, names=split_names(names), id_column=id_column, limit=limit
        )
    spec = ModelSpec(backbone, items.kind, revision, device, precision, max_length, trust_remote_code, allow_pickle)
    options = Options(layers, dtype, pool_at_extract, batch, items_per_shard, skip_bad)  # type: ignore[arg-type]
    say(console, f"{len(items):,} items: {items.format}")
    if dry_run:
        with console.status("timing a sample"):
            found = estimate(items, spec, out, options)
        say(
            console,
            f"{found.items:,} items, {found.tokens:,} tokens, {sized(found.bytes)} in {found.shards} shards, "
            f"about {clock(found.seconds)} on this machine ({found.sampled} items timed); {sized(found.free_bytes)} are free",
        )
        return
    done = run(items, spec, out, options, console, engine, address)
    report(done, console)


def from_raw(
    data: str,
    spec: ModelSpec,
    out: Path,
    options: Options,
    console: Console,
    labels: Path | None = None,
    id_column: str | None = None,
    column: str | None = None,
    names: str | None = None,
    limit: int | None = None,
    engine: str = "local",
    address: str = "auto",
    check: Callable[[RawItems], None] = lambda _: None,
    on_model: Callable[[Layout], None] = lambda _: None,
) -> str:
    """The store of raw data, made where it is not there yet; `check` sees the items and `on_model` the model before all."""
    from dataclasses import replace

    from cenote.features.raw import open_raw

    with console.status(Text(f"listing {data}")):
        items = open_raw(
            data,
            kind=spec.kind,
            labels=labels,
            column=column,
            names=split_names(names),
            id_column=id_column,
            limit=limit,
        )
    say(console, f"{len(items):,} items: {items.format}")
    check(items)
    report(run(items, replace(spec, kind=items.kind), out, options, console, engine, address, on_model), console)
    return str(out)


def run(
    items: RawItems,
    spec: ModelSpec,
    out: Path,
    options: Options,
    console: Console,
    engine: str = "local",
    address: str = "auto",
    on_model: Callable[[Layout], None] = lambda _: None,
) -> Extracted:
    """Extract with a line that tells rate and time left."""
    from cenote.jobs.extract import extract as extracted

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("reading", total=len(items), told="")

        def on_progress(now: Progress) -> None:
            told = f"{now.done:,} of {now.items:,}, {now.rate:.1f} items/s, {clock(now.left)} left"
            bars.update(bar, description="extracting", completed=now.done, told=told)

        def on_message(text: str) -> None:
            say(console, text)

        try:
            return extracted(
                items,
                spec,
                out,
                options,
                engine=chosen_engine(engine, address),
                on_progress=on_progress,
                on_message=on_message,
                on_model=on_model,
            )
        except KeyboardInterrupt:
            sys.stderr.write(f"interrupted: finished shards are kept in {out}; run the same command again to go on\n")
            raise


def report(done: Extracted, console: Console) -> None:
    """What was done, and what was left out."""
    shards = done.manifest.shards or ()
    rate = f", {sum(s.rows for s in shards) / done.seconds:.1f} items/s" if done.computed and not done.kept else ""
    say(
        console,
        f"{sum(s.rows for s in shards):,} items, {sum(s.tokens for s in shards):,} tokens, "
        f"{sized(sum(s.bytes for s in shards))}: {done.store} ({done.computed} shards made, {done.kept} kept, "
        f"{clock(done.seconds)}{rate})",
    )
    if cut := sum(s.shortened for s in shards):
        say(console, f"{cut:,} items were longer than the model takes, and were cut")
    if done.skipped:
        say(console, f"{len(done.skipped):,} unreadable items were left out:")
        for name, why in done.skipped[:LISTED]:
            say(console, f"  {name}: {why}")
        if len(done.skipped) > LISTED:
            say(console, f"  ... and {len(done.skipped) - LISTED:,} more")


def chosen_engine(name: str, address: str) -> Any:
    """The engine of that name; `None`: this process."""
    if known_engine(name) == "local":
        return None
    from cenote.scale import RayEngine

    return RayEngine(address)


def known_engine(name: str) -> str:
    """The same name.

    Raises:
        InputError: where there is no such engine.
    """
    if name not in ENGINES:
        raise InputError(f"engine: expected {' or '.join(ENGINES)}, got {name!r}")
    return name


def split_names(text: str | None) -> list[str] | None:
    """`"text,label"` as a list."""
    return None if text is None else [name.strip() for name in text.split(",")]


def clock(seconds: float) -> str:
    """A duration as people say it.

    >>> clock(8.2), clock(125), clock(7260), clock(float("inf"))
    ('8 s', '2:05 min', '2:01 h', 'unknown')
    """
    if seconds == float("inf"):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def sized(count: int) -> str:
    """Bytes as people say them.

    >>> sized(1_500_000)
    '1.5 MB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
