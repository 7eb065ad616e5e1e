"""The public names of the rooms: said once, in the two TOML files, and imported when they are first named."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from cenote.core.errors import InputError
from cenote.core.later import later

V = TypeVar("V")

ROOMS = ("pool", "reduce", "mix", "explain", "steer", "select")


@cache
def read(file: str) -> dict[str, Any]:
    """What a TOML file of the catalog says."""
    return tomllib.loads(resources.files("cenote.catalog").joinpath(file).read_text("utf-8"))


@cache
def places() -> dict[str, str]:
    """Name -> dotted path of everything that the catalog lists, in its order.

    Raises:
        InputError: where two things share a name.
    """
    named = read("methods.toml")
    paths = [p for s in read("systems.toml")["system"] for key in ("classes", "also") for p in s.get(key, ())]
    paths += [m["class"] for m in named["method"] if "." in m["class"]]
    return unique("name", ((p.rpartition(".")[2], p) for p in dict.fromkeys([*paths, *named["also"]])))


def unique(what: str, pairs: Iterable[tuple[str, V]]) -> dict[str, V]:
    """Pairs as a dictionary.

    Raises:
        InputError: where a key stands twice, of which the later would hide the earlier.

    >>> unique("name", [("SimPool", "a.SimPool"), ("SimPool", "b.SimPool")])
    Traceback (most recent call last):
    cenote.core.errors.InputError: catalog: the name SimPool stands twice, a.SimPool and b.SimPool; rename one
    """
    found: dict[str, V] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"catalog: the {what} {key} stands twice, {found[key]} and {value}; rename one")
        found[key] = value
    return found


def public(room: str) -> dict[str, str]:
    """Name -> dotted path of what `cenote.ROOM` shows, by name.

    >>> public("pool")["SimPool"]
    'cenote.pool.attention.simpool.SimPool'
    """
    return {name: path for name, path in sorted(places().items()) if path.startswith(f"cenote.{room}.")}


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a room, which is all that its `__init__` needs.

    Args:
        package: the room's `__name__`.
    """
    room = package.rpartition(".")[2]
    return later(package, lambda: public(room))
