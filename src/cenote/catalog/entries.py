"""The catalog: data in `systems.toml` and `methods.toml`, read once; classes are imported when they are asked for."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from cenote.core.errors import InputError

Status = Literal["complete", "no study yet", "planned"]


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        row: its number in the list of 119.
        slug: its name in cenote.
        title, year, paper: as published; `paper` is an arXiv id, a DOI or a venue.
        code: the authors' repository, `None` where none was found.
        room: where it lives, `pool/attention` for example.
        classes: dotted paths of our classes and functions.
        licence: of the authors' repository, as found there; `None` where nobody looked. No code of theirs is in cenote.
        legal: what a user should know besides, `None` for nearly all.
        when, cost: for people: when to use it, and what it takes; `None` where nobody has written it yet.
    """

    row: int
    slug: str
    title: str
    year: int
    paper: str
    code: str | None
    room: str
    classes: tuple[str, ...]
    licence: str | None = None
    legal: str | None = None
    when: str | None = None
    cost: str | None = None

    @property
    def status(self) -> Status:
        """Derived from what imports and which study exists, never typed by hand."""
        if not self.classes or not all(_exists(path) for path in self.classes):
            return "planned"
        return "complete" if self.study is not None else "no study yet"

    @property
    def study(self) -> str | None:
        """Module of the study that re-checks its claim, if there is one."""
        module = f"cenote.study.{self.slug.replace('-', '_')}"
        return module if importlib.util.find_spec(module) else None


@dataclass(frozen=True)
class Method:
    """Something that `create` builds by name: a pool, a reducer, a mixer and so on.

    Attributes:
        name: unique short name.
        path: dotted path of the class.
        room: `pool`, `reduce`, `mix`, ...
        kind: what it takes, within its room: `sets`, `maps`, `layers`, `graphs`, ...
        slug: the published system that it belongs to, if any.
        fast: whether `cenote probe --methods fast` includes it.
        settings: keyword arguments that make the class this method.
        summary: one line for people.
    """

    name: str
    path: str
    room: str
    kind: str
    summary: str
    slug: str | None = None
    fast: bool = False
    settings: dict[str, Any] | None = None

    def load(self) -> type[Any]:
        """The class itself."""
        return _load(self.path)


@cache
def systems() -> tuple[System, ...]:
    """All 119 published systems, by row."""
    rows = _read("systems.toml")["system"]
    return tuple(
        System(
            row=r["row"],
            slug=r["slug"],
            title=r["title"],
            year=r["year"],
            paper=r["paper"],
            code=r.get("code"),
            room=r["room"],
            classes=tuple(r.get("classes", ())),
            licence=r.get("licence"),
            legal=r.get("legal"),
            when=r.get("when"),
            cost=r.get("cost"),
        )
        for r in rows
    )


@cache
def _methods() -> dict[str, Method]:
    return {r["name"]: Method(**r) for r in _read("methods.toml")["method"]}


def methods(*, room: str | None = None, kind: str | None = None, fast: bool | None = None) -> tuple[Method, ...]:
    """The methods of a room and kind, in the order of the catalog.

    >>> [m.name for m in methods(room="pool", kind="sets")][:1]
    ['mean']
    """
    return tuple(
        m
        for m in _methods().values()
        if (room is None or m.room == room) and (kind is None or m.kind == kind) and (fast is None or m.fast == fast)
    )


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        InputError: naming the nearest names where there is none.
    """
    known = _methods()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`cenote list` prints all names"
        raise InputError(f"no method is called {name!r}; {hint}")
    return known[name]


def create(name: str, *args: Any, **kwargs: Any) -> Any:
    """Build a method by name.

    Args:
        name: as in `cenote list`.
        args, kwargs: of its class; they override the settings of the catalog.

    Raises:
        InputError: where no method has that name.

    >>> create("simpool", dim=768).out_dim
    768
    """
    entry = method(name)
    return entry.load()(*args, **{**(entry.settings or {}), **kwargs})


def find(text: str) -> list[System]:
    """The systems whose slug, title, room or class names hold every word of `text`; an exact slug comes alone.

    >>> [s.slug for s in find("simpool")]
    ['simpool']
    """
    exact = [s for s in systems() if s.slug == text]
    if exact:
        return exact
    words = text.lower().split()
    return [
        s for s in systems() if all(w in f"{s.slug} {s.title} {s.room} {' '.join(s.classes)}".lower() for w in words)
    ]


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("cenote.catalog").joinpath(name).read_text("utf-8"))


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _exists(path: str) -> bool:
    try:
        _load(path)
    except (ImportError, AttributeError):
        return False
    return True
