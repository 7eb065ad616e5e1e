"""`cenote models show`: what a model gives, before hours are spent on it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cenote.cli import options
from cenote.cli.console import emit

app = typer.Typer(no_args_is_help=True, help="Models that give tokens.")
WIDE = 120


@app.callback()
def models() -> None:
    """Models that give tokens."""


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME_OR_DIR", help="Folder of a saved model, or a name on the hub.")],
    kind: Annotated[str | None, typer.Option(help="image, audio or text, where a model takes several.")] = None,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
    allow_pickle: options.Pickle = False,
    as_json: options.Json = False,
) -> None:
    """Show tokens, grid, layers, heads and preprocessing of a model, found by showing it one sample."""
    from dataclasses import asdict

    from cenote.models import load

    backbone = load(
        name, kind, revision=revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )  # fmt: skip
    facts = {"identity": asdict(backbone.identity), "layout": asdict(backbone.layout)}
    if as_json:
        emit(facts)
        return
    console = Console()
    console = console if console.is_terminal else Console(width=WIDE)
    console.print(_table(facts))


def _table(facts: dict[str, Any]) -> Table:
    who, lie = facts["identity"], facts["layout"]
    table = Table(show_header=False, title=Text(str(who["name"]), "table.title"))
    grid = "none" if lie["grid"] is None else f"{lie['grid'][0]} x {lie['grid'][1]}"
    shapes = list(zip(lie["tokens"], lie["dims"], strict=True))
    rows = [
        ("model", f"{who['model_class']} of {who['library']}, {lie['parameters']:,} parameters"),
        ("takes", lie["kind"]),
        ("revision", who["revision"] or "a local folder"),
        ("weights", f"SHA-256 {who['weights_sha256']}"),
        ("tokens", f"{lie['tokens'][-1]} of {lie['sample']}"),
        ("prefix tokens", str(lie["prefix_tokens"])),
        ("grid", grid),
        ("layers", f"0 to {lie['blocks']} (0: the embeddings, {lie['blocks']}: the output)"),
        ("tokens x width", _shapes(shapes)),
        ("heads", str(lie["heads"] or "not told")),
        *((f"preprocessing: {k}", json.dumps(v)) for k, v in lie["preprocessing"].items()),
        *(("note", note) for note in lie["notes"]),
    ]
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _shapes(shapes: list[tuple[int, int]]) -> str:
    if len(set(shapes)) == 1:
        return f"{shapes[0][0]} x {shapes[0][1]} in every layer"
    return ", ".join(f"{n}: {tokens} x {dim}" for n, (tokens, dim) in enumerate(shapes))
