"""`cenote list` and `cenote show`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cenote.catalog import find, methods, systems
from cenote.core.errors import InputError


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
    console = Console()
    console.print(table)
    names = Table("name", "what it does", title="cenote.create(name, ...)")
    for m in methods(room=None if room is None else room.split("/")[0]):
        names.add_row(m.name, m.summary)
    if names.row_count:
        console.print(names)


def show(slug: Annotated[str, typer.Argument(help="A system's slug, or words of its title.")]) -> None:
    """Show one system: paper, classes, study, status."""
    found = find(slug)
    if not found:
        raise InputError(f"SLUG: no system matches {slug!r}; `cenote list` prints all")
    console = Console()
    if len(found) > 1:
        console.print(f"{len(found)} systems match:")
        for s in found:
            console.print(f"  {s.slug}: {s.title}")
        return
    s = found[0]
    table = Table(show_header=False, title=s.title)
    for name, value in (
        ("row", str(s.row)),
        ("slug", s.slug),
        ("year", str(s.year)),
        ("paper", s.paper),
        ("authors' code", s.code or "none found"),
        ("room", s.room),
        ("classes", "\n".join(s.classes) or "none yet"),
        ("built by name", ", ".join(m.name for m in methods() if m.slug == s.slug) or "-"),
        ("study", s.study or "none yet"),
        ("status", s.status),
    ):
        table.add_row(name, value)
    console.print(table)
