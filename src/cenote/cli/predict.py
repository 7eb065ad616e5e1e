"""`cenote predict`: a saved probe on new data."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from cenote.cli import options
from cenote.cli.console import emit, say, talking

TOKENS_LISTED = 5


def predict(
    best: Annotated[Path, typer.Argument(help="Folder of a saved probe: OUT/best or OUT/recommended.")],
    data: Annotated[str, typer.Argument(help="As for cenote probe; labels are not needed.")],
    out: Annotated[Path, typer.Option(help="CSV file to write.")] = Path("predictions.csv"),
    vectors: options.Vectors = None,
    max_item_size: options.MaxItemSize = options.DEFAULT_SIZE,
    own: options.Own = None,
    as_json: options.Json = False,
) -> None:
    """Write a prediction per item, its scores, and the tokens that the probe looked at most."""
    import cenote.core.files as files
    import cenote.features as features
    from cenote.core import InputError
    from cenote.jobs.probe import load

    files.require_place(out, "out")
    if own is not None:
        options.import_from_here(f"{own}.")
    saved = load(best)
    items = features.read(
        data,
        vector_column=vectors,
        prefix_tokens=saved.prefix_tokens,
        labelled=False,
        layers="all" if saved.layers else None,
        max_item_size=options.parsed_size(max_item_size),
    )
    items = saved.view(items)
    if items.dim != saved.dim:
        raise InputError(f"data: its tokens have width {items.dim}, but the probe in {best} takes {saved.dim}")
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["id", "prediction", *(f"score {c}" for c in saved.classes), "tokens looked at", "their weights"])
    told = []
    for i, name in enumerate(items.ids):
        x = items.copies(i)
        scores = saved.scores(x).squeeze(0)
        weights = saved.attend(x).weights
        looked, share = "", ""
        if weights is not None and weights.shape[-1]:
            top = weights.flatten(0, -2).mean(0).topk(min(TOKENS_LISTED, weights.shape[-1]))
            looked = " ".join(str(n + saved.probe.drop) for n in top.indices.tolist())
            share = " ".join(f"{w:.3f}" for w in top.values.tolist())
        by_class = dict(zip(saved.classes, scores.tolist(), strict=True))
        told.append({"id": name, "prediction": saved.word(scores), "scores": by_class})
        table.writerow([name, saved.word(scores), *(f"{s:.6g}" for s in scores.tolist()), looked, share])
    files.write_whole(out, text.getvalue())
    say(talking(as_json), f"{len(items)} predictions: {out}")
    if as_json:
        emit({"out": out, "predictions": told})
