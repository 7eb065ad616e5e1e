"""`cenote report`: the page of a finished comparison, once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cenote.cli.console import say


def report(
    out: Annotated[Path, typer.Argument(help="Folder of results that cenote probe wrote.")] = Path("cenote-out"),
) -> None:
    """Rebuild report.html from what cenote probe left in a folder; nothing is trained."""
    from cenote.report import write

    say(Console(), f"report: {write(out)}")
