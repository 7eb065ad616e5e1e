"""`cenote study`: does a published claim show here?"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cenote.cli.console import PlainConsole, plain
from cenote.core.errors import InputError

ONE_OUT = Path("cenote-out/studies")
ALL_OUT = Path("docs/studies")


def study(
    slug: Annotated[str | None, typer.Argument(help="Published system, as in cenote list.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every study; writes the scoreboard.")] = False,
    size: Annotated[str, typer.Option(help="smoke (seconds), small (minutes on 2 cores) or full.")] = "small",
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for results: {ONE_OUT}, with --all {ALL_OUT} (finished ones are kept).")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="With --all: only these rows, 7,9,16-28 for example.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="With --all: run finished studies again.")] = False,
    scoreboard: Annotated[
        Path | None,
        typer.Option(help="With --all: the page to write; default scoreboard.md beside the folder of results."),
    ] = None,
) -> None:
    """Re-check the claim of one published system, or of all, on small data; decided by an interval over seeds."""
    if every == (slug is not None):
        raise InputError("SLUG: give the name of one system, or --all")
    if not every and (rows is not None or fresh or scoreboard is not None):
        raise InputError("--rows, --fresh and --scoreboard belong to --all")
    from cenote.study.harness import SIZES

    if size not in SIZES:
        raise InputError(f"--size: expected one of {', '.join(SIZES)}, got {size!r}")
    if every:
        _all(size, out or ALL_OUT, None if rows is None else parse_rows(rows), seed, fresh, scoreboard)
    else:
        assert slug is not None
        _one(slug, size, out or ONE_OUT, seed)


def parse_rows(text: str) -> list[int]:
    """Row numbers and ranges.

    >>> parse_rows("7, 9,16-18")
    [7, 9, 16, 17, 18]
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"--rows: expected numbers and ranges such as 7,9,16-28, got {text!r}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _one(slug: str, size: str, out: Path, seed: int) -> None:
    from cenote.study.harness.checks import bounds, effect
    from cenote.study.harness.pages import gates, knock_outs, outcome, registered
    from cenote.study.harness.runner import study_of, write

    console = PlainConsole()
    run = study_of(slug)
    with console.status(f"{slug}, size {size}"):
        verdict = write(run(seed, size), out)  # type: ignore[arg-type]
    console.print(verdict.claim, highlight=False)
    console.print(verdict.rule, highlight=False, style="dim")
    table = Table()
    for heading in ("check", "measured (95 % interval)", "expected", "outcome"):
        table.add_column(heading)
    for c in verdict.checks:
        table.add_row(c.what, effect(c), bounds(c), outcome(c) if c.in_rule else f"{outcome(c)}; reported only")
    console.print(table)
    for note in verdict.notes:
        console.print(f"- {note}", highlight=False)
    shown = f"knock-outs: {knock_outs(verdict)}. gate: {gates(verdict)}. rule: {registered(slug)}"
    console.print(shown, highlight=False, style="dim")
    console.print(f"[bold]{slug}: {verdict.said}[/bold]", highlight=False)
    console.print(
        f"{len(verdict.seeds)} seeds, {verdict.seconds:.0f} CPU seconds; {out / slug}.md, .svg, .json", highlight=False
    )


def _all(size: str, out: Path, rows: list[int] | None, seed: int, fresh: bool, board: Path | None) -> None:
    from cenote.core.files import write_whole
    from cenote.study.harness.pages import scoreboard
    from cenote.study.harness.runner import read, run_all

    console = PlainConsole()
    board = board or out.parent / "scoreboard.md"
    walk = run_all(
        out,
        size,  # type: ignore[arg-type]
        seed,
        rows=rows,
        fresh=fresh,
        on_study=lambda slug, what: console.print(f"{slug}: {what}", highlight=False),
    )
    folder = Path(os.path.relpath(out, board.parent)).as_posix()
    write_whole(board, scoreboard(read(out), folder, walk.earlier))
    console.print(f"{len(walk.ran)} run, {len(walk.kept)} kept, {len(walk.failed)} failed: {board}", highlight=False)
    for slug, message in walk.failed.items():
        sys.stderr.write(f"{slug}: {plain(message)}\n")
    if walk.failed:
        raise typer.Exit(1)
