"""The public names of the rooms: said once, in the two TOML files, and imported when they are first named."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

ROOMS = ("pool", "reduce", "mix", "explain", "steer", "select")


@cache
def read(file: str) -> dict[str, Any]:
    """What a TOML file of the catalog says."""
    return tomllib.loads(resources.files("cenote.catalog").joinpath(file).read_text("utf-8"))


@cache
def places() -> dict[str, str]:
    """Name -> dotted path of everything that the catalog lists, in its order."""
    named = read("methods.toml")
    paths = [p for s in read("systems.toml")["system"] for key in ("classes", "also") for p in s.get(key, ())]
    paths += [m["class"] for m in named["method"] if "." in m["class"]]
    return {p.rpartition(".")[2]: p for p in [*paths, *named["also"]]}


def public(room: str) -> dict[str, str]:
    """Name -> dotted path of what `cenote.ROOM` shows, by name.

    >>> public("pool")["SimPool"]
    'cenote.pool.attention.simpool.SimPool'
    """
    return {name: path for name, path in sorted(places().items()) if path.startswith(f"cenote.{room}.")}


def load(path: str) -> Any:
    """What stands at a dotted path. The only place below the rooms that imports from them."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a room, which is all that its `__init__` needs.

    Args:
        package: the room's `__name__`.
    """
    room = package.rpartition(".")[2]

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return list(public(room))
        path = None if name.startswith("_") else public(room).get(name)
        if path is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # kept, so that it is looked up once
        return vars(sys.modules[package]).setdefault(name, load(path))

    def __dir__() -> list[str]:
        return list(public(room))

    return __getattr__, __dir__
