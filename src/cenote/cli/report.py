"""`cenote report`: the page of a finished comparison, once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cenote.cli import options
from cenote.cli.console import emit, say, talking


def report(
    out: Annotated[
        Path, typer.Argument(help="Folder of results that cenote probe, explain, reduce or mix wrote.")
    ] = Path("cenote-out"),
    as_json: options.Json = False,
) -> None:
    """Rebuild report.html from what cenote probe, explain, reduce or mix left in a folder; nothing is run."""
    from cenote.report import write

    page = write(out)
    say(talking(as_json), f"report: {page}")
    if as_json:
        emit({"report": page})
