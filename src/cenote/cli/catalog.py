"""`cenote list` and `cenote show`."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from cenote.catalog import System, find, method, methods, systems
from cenote.catalog.entries import owner_of
from cenote.catalog.names import places
from cenote.catalog.parts import State
from cenote.cli import options
from cenote.cli.console import PlainConsole, emit
from cenote.core.errors import InputError

PIPE_WIDTH = 240


def list_methods(
    room: Annotated[str | None, typer.Option(help="Only this room: pool, pool/attention, reduce, mix, ...")] = None,
    as_json: options.Json = False,
) -> None:
    """List the published systems and the names that cenote.create builds."""
    rows = [s for s in systems() if room is None or s.room == room or s.room.startswith(f"{room}/")]
    if not rows:
        rooms = sorted({s.room for s in systems()})
        raise InputError(f"--room: no system lives in {room!r}; rooms are {', '.join(rooms)}")
    slugs = {s.slug for s in rows}
    built = [m for m in methods(room=None if room is None else room.split("/")[0]) if m.slug in slugs or m.slug is None]
    if as_json:
        emit({"systems": [_told(s) for s in rows], "methods": [dataclasses.asdict(m) for m in built]})
        return
    table = Table("row", "system", "year", "room", "status", "parts", "title")
    for s in rows:
        table.add_row(str(s.row), s.slug, str(s.year), s.room, s.status, _counted(s), s.title)
    console = _console()
    console.print(table)
    names = Table(
        "name",
        "what it does",
        "system",
        title="cenote.create(name, ...); * in --methods fast of cenote probe, explain or mix",
    )
    for m in built:
        names.add_row(f"{m.name} *" if m.fast else m.name, m.summary, m.slug or "")
    if names.row_count:
        console.print(names)


def show(
    slug: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A system's slug, a name of cenote list, a class, or words of a title."),
    ],
    as_json: options.Json = False,
) -> None:
    """Show one system: paper, classes, study, status; or a method that belongs to none."""
    found = [s for s in systems() if s.slug == slug] or [s for s in (owner_of(slug),) if s is not None]
    if not found and (entry := _of_no_system(slug)):
        if as_json:
            emit({"name": slug, **{key.replace(" ", "_"): value for key, value in entry}})
            return
        _console().print(_table(slug, entry))
        return
    found = found or find(slug)
    if not found:
        known = [*(s.slug for s in systems()), *(m.name for m in methods()), *places()]
        near = difflib.get_close_matches(slug, dict.fromkeys(known), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`cenote list` prints all"
        raise InputError(f"SLUG: no system matches {slug!r}; {hint}")
    if as_json:
        emit(_told(found[0]) if len(found) == 1 else {"systems": [s.slug for s in found]})
        return
    console = _console()
    if len(found) > 1:
        console.print(f"{len(found)} systems match:")
        for s in found:
            console.print(f"  {s.slug}: {s.title}", highlight=False)
        return
    s = found[0]
    rows = (
        ("row", str(s.row)),
        ("slug", s.slug),
        ("year", str(s.year)),
        ("paper", s.paper),
        ("authors' code", s.code or "none found"),
        ("its licence", s.licence or "-"),
        ("room", s.room),
        ("classes", "\n".join(s.classes) or "none yet"),
        ("with them", "\n".join(s.also) or None),
        ("built by name", ", ".join(m.name for m in methods() if m.slug == s.slug) or "-"),
        ("study", s.study or "none yet"),
        ("status", s.standing),
        ("note", s.legal),
    )
    console.print(_table(s.title, [(name, value) for name, value in rows if value is not None]))
    if s.parts:
        table = Table("part", "kind", "state", "where, or why not", title="What it consists of")
        for p in s.parts:
            table.add_row(p.name, p.kind, p.state, "\n".join(filter(None, [*p.met_by, p.missing, p.answered])))
        console.print(table)


def _told(s: System) -> dict[str, Any]:
    """A system for machines."""
    built = [m.name for m in methods() if m.slug == s.slug]
    known: dict[str, Any] = {"study": s.study, "status": s.status, "standing": s.standing, "built_by_name": built}
    if s.parts:
        states = Counter(p.state for p in s.parts)
        known["parts"] = {
            "all": len(s.parts),
            **{state: states[state] for state in get_args(State)},
            "list": [{**dataclasses.asdict(p), "state": p.state} for p in s.parts],
        }
    return {**dataclasses.asdict(s), **known}


def _counted(s: System) -> str:
    """Parts that are met or answered, of all."""
    return f"{s.settled}/{len(s.parts)}" if s.parts else "-"


def _of_no_system(name: str) -> list[tuple[str, str]]:
    """What is known of a method, or a class, that belongs to no published system; nothing of another name."""
    if name in {m.name for m in methods()}:
        m = method(name)
        built = ", ".join(n.name for n in methods() if n.path == m.path)
        return [("what it does", m.summary), ("class", m.path), ("takes", m.kind), ("built by name", built)]
    if path := places().get(name):
        return [("class", path), ("built by name", ", ".join(m.name for m in methods() if m.path == path) or "-")]
    return []


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _console() -> Console:
    console = PlainConsole()
    # wide where nobody looks, so that every row stays on the one line that grep and cut expect
    return console if console.is_terminal else PlainConsole(width=PIPE_WIDTH)
