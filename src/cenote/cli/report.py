"""`cenote report`: the page of a finished comparison once more, or of two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cenote.cli import options
from cenote.cli.console import emit, say, talking
from cenote.core import InputError

USUAL, BOTH = Path("cenote-out"), Path("both.html")


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folder of results that cenote probe, explain, reduce or mix wrote (default: cenote-out); or two of "
            "cenote probe, which are laid side by side."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Of two runs: file to write, both.html if not said otherwise.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Rebuild report.html from what a command left in a folder, or lay two runs side by side; nothing is run."""
    from cenote.report import write, write_beside

    runs = runs or [USUAL]
    if len(runs) > 2:
        raise InputError(f"runs: expected one or two folders, got {len(runs)}; lay two side by side at a time")
    if len(runs) == 1:
        if out is not None:
            raise InputError("out: the page of one run lies in its folder; leave it out, or name a second run")
        page = write(runs[0])
        say(talking(as_json), f"report: {page}")
        if as_json:
            emit({"report": page})
        return
    page = out or BOTH
    found = write_beside(runs[0], runs[1], page)
    say(talking(as_json), found.sentence, "bold")
    if found.apart:
        say(talking(as_json), f"not paired: {found.apart}", "yellow")
    say(talking(as_json), f"report: {page}")
    if as_json:
        emit({"report": page, "sentence": found.sentence, "not_paired": found.apart, "tests": list(found.tests)})
