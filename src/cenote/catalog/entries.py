"""The catalog: data in `systems.toml` and `methods.toml`, read once; classes are imported when they are asked for."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from importlib.resources.abc import Traversable
from numbers import Integral
from typing import Any, Literal

from cenote.catalog.names import places, read, unique
from cenote.catalog.parts import Part, parts
from cenote.core.errors import InputError
from cenote.core.later import load

Status = Literal["complete", "partial", "planned"]


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
        also: dotted paths of what only helps them and is public too: a base, what a call returns, a reader of files.
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
    also: tuple[str, ...] = ()
    licence: str | None = None
    legal: str | None = None
    when: str | None = None
    cost: str | None = None

    @property
    def status(self) -> Status:
        """Derived from which classes exist, which study exists and which parts are met, never typed by hand."""
        if not self.classes or not all(_exists(path) for path in self.classes):
            return "planned"
        known = self.parts and self.study is not None
        return "complete" if known and not self.missing else "partial"

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it consists of, see `cenote.catalog.parts`."""
        return parts(self.slug)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the parts that are not there yet."""
        return tuple(p.name for p in self.parts if p.state == "missing")

    @property
    def settled(self) -> int:
        """How many parts are met or answered."""
        return len(self.parts) - len(self.missing)

    @property
    def standing(self) -> str:
        """The status in words, with what is missing.

        >>> find("attencraft")[0].standing
        'planned'
        """
        if self.status != "partial":
            return self.status
        if not self.parts:
            return "partial (parts not gone through)"
        reasons = [*self.missing, *(() if self.study else ("study",))]
        return f"partial (missing: {', '.join(reasons)})"

    @property
    def study(self) -> str | None:
        """Module of the study that re-checks its claim, if there is one."""
        module = f"cenote.study.{self.slug.replace('-', '_')}"
        return module if file_of(module) is not None else None


@dataclass(frozen=True)
class Method:
    """Something that `create` builds by name: a pool, a reducer, a mixer and so on.

    Attributes:
        name: unique short name.
        path: dotted path of the class.
        room: `pool`, `reduce`, `mix`, ...
        kind: what it takes, within its room: `sets`, `maps`, `layers`, `graphs`, ...
        slug: the published system that it belongs to, if any.
        fast: whether `--methods fast` of the room's command includes it.
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
        return load(self.path)


@cache
def systems() -> tuple[System, ...]:
    """All 119 published systems, by row."""
    rows = read("systems.toml")["system"]
    unique("slug", ((r["slug"], f"row {r['row']}") for r in rows))
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
            also=tuple(r.get("also", ())),
            licence=r.get("licence"),
            legal=r.get("legal"),
            when=r.get("when"),
            cost=r.get("cost"),
        )
        for r in rows
    )


@cache
def _methods() -> dict[str, Method]:
    """The room and the system of a method follow from its class."""
    owners = {path: s.slug for s in systems() for path in s.classes}
    rows = read("methods.toml")["method"]
    unique("method", ((row["name"], row["class"]) for row in rows))
    known = {}
    for row in rows:
        said = row["class"]
        path = said if "." in said else places().get(said)
        if path is None:
            raise InputError(
                f"methods.toml: no system lists the class {said!r} of the method {row['name']!r}; list its dotted path in "
                f"systems.toml, or give the dotted path here"
            )
        known[row["name"]] = Method(
            name=row["name"],
            path=path,
            room=path.split(".")[1],
            kind=row["kind"],
            summary=row["summary"],
            slug=owners.get(path),
            fast=row.get("fast", False),
            settings=row.get("settings"),
        )
    return known


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
    """The method of that name, or the only one that builds the class or the system of that name.

    A dotted path names a class of somebody else, of a module that is imported already: a name out of a file runs no code. See
    `import_own`.

    Raises:
        InputError: where there is none, naming what builds the system or the class of that name, or the nearest names.

    >>> method("SimPool").name
    'simpool'
    """
    known = _methods()
    if name in known:
        return known[name]
    if "." in name:
        return _own(name)
    builders = builders_of(name)
    if len(builders) != 1:
        raise InputError(f"no method is called {name!r}; {_instead(name)}")
    return builders[0]


def import_own(name: str) -> None:
    """Import the module of a dotted path such as `mypackage.pools.MyPool`, as whoever writes it down wants; other names are
    left alone.

    Raises:
        InputError: where there is no such module, or it cannot be imported.
    """
    module = name.rpartition(".")[0]
    if not module or name in _methods():
        return
    try:
        import_module(module)
    except Exception as error:  # whatever somebody's module raises
        raise InputError(f"{name}: the module {module} cannot be imported ({type(error).__name__}: {error})") from None


def _own(path: str) -> Method:
    """The method that a class of an imported module is."""
    module, _, name = path.rpartition(".")
    if module not in sys.modules:
        raise InputError(
            f"{path}: the module {module} is not imported; import it first, if it is yours (cenote predict --own {module})"
        )
    built = getattr(sys.modules[module], name, None)
    if not isinstance(built, type):
        raise InputError(f"{path}: there is no class {name} in {module}")
    return entry_of(built, path)


def entry_of(built: type, name: str) -> Method:
    """The method that a class of somebody else is, under a name.

    Raises:
        InputError: where it derives from no base of a room.
    """
    # what says so is the base of a room
    base = next((b for b in built.__mro__ if "method_kind" in vars(b) and b.__module__.startswith("cenote.")), None)
    if base is None:
        raise InputError(f"{name}: derives from no base of a room, such as Pool or Reducer; see docs/architecture.md")
    room, kind = base.__module__.split(".")[1], base.method_kind  # type: ignore[attr-defined]
    summary = (inspect.getdoc(built) or "of your own").strip().splitlines()[0]
    return Method(name=name, path=f"{built.__module__}.{built.__qualname__}", room=room, kind=kind, summary=summary)


def builders_of(name: str) -> list[Method]:
    """The methods that build a class or a system, by the name of the one or the slug of the other."""
    return [m for m in _methods().values() if name in (m.path.rpartition(".")[2], m.slug)]


def owner_of(name: str) -> System | None:
    """The system that a method or a public class, by its name, is part of; `None` where it is of none, or there is none."""
    path = _methods()[name].path if name in _methods() else places().get(name)
    return next((s for s in systems() if path is not None and path in (*s.classes, *s.also)), None)


def create(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Build a method by name.

    Args:
        name: as in `cenote list`, or of the class.
        args, kwargs: of its class; they override the settings of the catalog.

    Raises:
        InputError: where no method has that name, or its class does not take such arguments.

    >>> create("simpool", dim=768).out_dim
    768
    """
    entry = method(name)
    built, arguments = entry.load(), {**(entry.settings or {}), **kwargs}
    signature = inspect.signature(built)
    try:
        bound = signature.bind(*args, **arguments)
    except TypeError as error:
        raise InputError(f"{name}: {error}; it takes {', '.join(signature.parameters)}") from None
    for argument, value in bound.arguments.items():
        counts = signature.parameters[argument].annotation in (int, "int")
        if counts and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise InputError(f"{argument}: expected a whole number for {name}, got {value!r}")
    return built(*args, **arguments)


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


def _instead(name: str) -> str:
    """What to do with a name that builds nothing; the slug of a system and the name of a class lead to what they have."""
    known = _methods()
    if names := [m.name for m in builders_of(name)]:
        return f"the names that build it, or parts of it, are {', '.join(names)}"
    listed = next((s.classes for s in systems() if s.slug == name), None)
    if listed == ():
        return "it is a published system that is planned"
    if paths := listed or [path for key, path in places().items() if key == name]:
        room, found = paths[0].split(".")[1], [path.rpartition(".")[2] for path in paths]
        return f"no name builds it, but there is `from cenote.{room} import {', '.join(found)}`"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else "`cenote list` prints all names"


def file_of(module: str) -> Traversable | None:
    """The file of one of cenote's modules, which is not imported; none where there is no such module."""
    folder = resources.files("cenote")
    *above, name = module.split(".")[1:]
    for part in above:
        folder = folder.joinpath(part)
    return next((f for f in (folder.joinpath(f"{name}.py"), folder.joinpath(name, "__init__.py")) if f.is_file()), None)


@cache
def _exists(path: str) -> bool:
    """Whether a class or function stands at a dotted path: its file is read and not run, so that a list needs no torch."""
    module, _, name = path.rpartition(".")
    file = file_of(module)
    defined = rf"^(?:class|def) {re.escape(name)}\b|^{re.escape(name)}\b[^=\n]*="
    return file is not None and re.search(defined, file.read_text("utf-8"), re.MULTILINE) is not None
