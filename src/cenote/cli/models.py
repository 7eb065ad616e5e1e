"""`cenote models show`: what a model gives, before hours are spent on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cenote.cli import options
from cenote.cli.console import PlainConsole, emit

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
    """Show tokens, grid, layers, heads and preprocessing of a model, found by showing it one sample, and what can be edited."""
    from dataclasses import asdict

    from cenote.models.live import reach, stacks
    from cenote.models.load import load_whole

    backbone, model = load_whole(
        name, kind, revision=revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )  # fmt: skip
    facts = {
        "identity": asdict(backbone.identity),
        "layout": asdict(backbone.layout),
        "live": {"attention": [asdict(found) for found in reach(model)], "blocks": stacks(model)},
    }
    if as_json:
        emit(facts)
        return
    console = PlainConsole()
    console = console if console.is_terminal else PlainConsole(width=WIDE)
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
        *_live(facts["live"]),
    ]
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _live(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What can be recorded and edited while the model runs."""
    rows = [
        (f"hidden states: {stack}", f"of blocks {_numbers(range(count))}: recorded, edited")
        for stack, count in found["blocks"].items()
    ]
    for at in found["attention"]:
        heads = f"{at['heads']} heads" if at["heads"] else "heads not told"
        if at["kv_heads"] != at["heads"]:
            heads += f" on {at['kv_heads']} of keys"
        can = f"not reached: {at['why_not']}"
        if not at["why_not"]:
            masks = "masks" if "allowed" in at["edits"] else "no masks"
            can = f"rows, maps, heads' outputs, queries, keys, values recorded and edited, {masks} edited"
        blocks = f" of blocks {_numbers(at['blocks'])}" if at["stack"] else ""
        what = f"{at['kind']}-attention: {at['stack'] or 'outside of blocks'}"
        rows.append((what, f"{heads}{blocks}, by {at['attention']}: {can}"))
    return rows


def _numbers(blocks: Sequence[int]) -> str:
    """Runs of numbers: 0-2, 5."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _shapes(shapes: list[tuple[int, int]]) -> str:
    if len(set(shapes)) == 1:
        return f"{shapes[0][0]} x {shapes[0][1]} in every layer"
    return ", ".join(f"{n}: {tokens} x {dim}" for n, (tokens, dim) in enumerate(shapes))
