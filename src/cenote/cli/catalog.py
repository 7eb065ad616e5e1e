"""`cenote list` and `cenote show`."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cenote.catalog import find, methods, systems
from cenote.core.errors import InputError

PIPE_WIDTH = 240


def list_methods(
    room: Annotated[str | None, typer.Option(help="Only this room: pool, pool/attention, reduce, mix, ...")] = None,
) -> None:
    """List the published systems and the names that cenote.create builds."""
    rows = [s for s in systems() if room is None or s.room == room or s.room.startswith(f"{room}/")]
    if not rows:
        rooms = sorted({s.room for s in systems()})
        raise InputError(f"--room: no system lives in {room!r}; rooms are {', '.join(rooms)}")
    table = Table("row", "system", "year", "room", "status", "title")
    for s in rows:
        table.add_row(str(s.row), s.slug, str(s.year), s.room, s.status, s.title)
    console = _console()
    console.print(table)
    slugs = {s.slug for s in rows}
    names = Table("name", "what it does", "system", title="cenote.create(name, ...); * in cenote probe --methods fast")
    for m in methods(room=None if room is None else room.split("/")[0]):
        if m.slug in slugs or m.slug is None:
            names.add_row(f"{m.name} *" if m.fast else m.name, m.summary, m.slug or "")
    if names.row_count:
        console.print(names)


def show(slug: Annotated[str, typer.Argument(help="A system's slug, or words of its title.")]) -> None:
    """Show one system: paper, classes, study, status."""
    found = find(slug)
    if not found:
        near = difflib.get_close_matches(slug, [s.slug for s in systems()], n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`cenote list` prints all"
        raise InputError(f"SLUG: no system matches {slug!r}; {hint}")
    console = _console()
    if len(found) > 1:
        console.print(f"{len(found)} systems match:")
        for s in found:
            console.print(f"  {s.slug}: {s.title}", highlight=False)
        return
    s = found[0]
    table = Table(show_header=False, title=s.title)
    for name, value in (
        ("row", str(s.row)),
        ("slug", s.slug),
        ("year", str(s.year)),
        ("paper", s.paper),
        ("authors' code", s.code or "none found"),
        ("its licence", s.licence or "-"),
        ("room", s.room),
        ("classes", "\n".join(s.classes) or "none yet"),
        ("built by name", ", ".join(m.name for m in methods() if m.slug == s.slug) or "-"),
        ("study", s.study or "none yet"),
        ("status", s.status),
        ("note", s.legal),
    ):
        if value is not None:
            table.add_row(name, value)
    console.print(table)


def _console() -> Console:
    console = Console()
    # wide where nobody looks, so that every row stays on the one line that grep and cut expect
    return console if console.is_terminal else Console(width=PIPE_WIDTH)
