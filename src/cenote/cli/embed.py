"""`cenote embed`: the pooled vectors of a saved probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cenote.cli import options
from cenote.cli.console import emit, say, talking
from cenote.cli.tokens import extracting

LANCE = "lancedb://"


def embed(
    best: options.SavedProbe,
    data: options.Unseen,
    out: Annotated[
        str,
        typer.Option(help="File to write: .parquet (id, vector) or .npy (ids beside it); or lancedb://FOLDER/TABLE."),
    ] = "vectors.parquet",
    force: options.Force = False,
    vectors: options.Vectors = None,
    id_column: options.Id = None,
    max_item_size: options.MaxItemSize = options.DEFAULT_SIZE,
    # raw items, and the model of the probe
    backbone: options.ModelNow = None,
    features: options.KeptTokens = None,
    column: options.Column = None,
    names: options.Names = None,
    limit: options.Limit = None,
    batch: options.Batch = 32,
    device: options.Device = "cpu",
    skip_bad: options.SkipBad = False,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    own: options.Own = None,
    as_json: options.Json = False,
) -> None:
    """Write one vector per item: what the pool of a saved probe makes of it."""
    import cenote.core.files as files
    from cenote.bridges import lancedb
    from cenote.jobs.probe import Reading, load
    from cenote.jobs.probe.embedding import embed as embedded
    from cenote.jobs.probe.embedding import require_name

    table = lancedb.place_of(out.removeprefix(LANCE)) if out.startswith(LANCE) else None
    if table is None:
        require_name(Path(out))
        files.require_place(Path(out), "out")
    if own is not None:
        options.import_from_here(f"{own}.")
    console = talking(as_json)
    saved = load(best)
    reading = Reading(
        force=force, vector_column=vectors, id_column=id_column, max_item_size=options.parsed_size(max_item_size),
        backbone=backbone, features=features, column=column, names=options.split_names(names), limit=limit, batch=batch,
        device=device, skip_bad=skip_bad, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
    )  # fmt: skip
    with extracting(console, None, features) as on_progress:
        made = embedded(saved, data, reading, on_progress=on_progress, on_message=lambda text: say(console, text))
    if table is None:
        made.write(out)
    else:
        lancedb.write_table(*table, made.table())
    width = made.vectors.shape[1]
    say(console, f"{len(made):,} vectors of width {width}: {out}")
    if as_json:
        emit({"out": out, "items": len(made), "width": width, **made.about})
