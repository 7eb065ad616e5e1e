"""`cenote predict`: a saved probe on new data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cenote.cli import options
from cenote.cli.console import emit, say, talking
from cenote.cli.tokens import extracting


def predict(
    best: options.SavedProbe,
    data: options.Unseen,
    out: Annotated[Path, typer.Option(help="CSV file to write.")] = Path("predictions.csv"),
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
    """Write a prediction per item, its scores, and the tokens that the probe looked at most."""
    import cenote.core.files as files
    from cenote.jobs.probe import load
    from cenote.jobs.probe.predicting import as_csv
    from cenote.jobs.probe.predicting import predict as predicted
    from cenote.jobs.probe.unseen import Reading

    files.require_place(out, "out")
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
        told = predicted(saved, data, reading, on_progress=on_progress, on_message=lambda text: say(console, text))
    files.write_whole(out, as_csv(told, saved.classes))
    say(console, f"{len(told)} predictions: {out}")
    if as_json:
        shown = [{"id": made.id, "prediction": made.prediction, "scores": made.scores} for made in told]
        emit({"out": out, "predictions": shown})
