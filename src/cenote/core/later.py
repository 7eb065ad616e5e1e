"""What waits until it is needed: names of a package, so that importing it costs nothing, and what follows an import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def later(
    package: str, places: Callable[[], Mapping[str, str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        places: gives name -> dotted path of all that it shows.

    Example:
        >>> find, names = later("cenote.core", lambda: {"Bags": "cenote.core.sets.Bags"})
        >>> find("Bags").__module__, names()
        ('cenote.core.sets', ['Bags'])
    """

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return list(places())
        path = None if name.startswith("_") else places().get(name)
        if path is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # kept, so that it is looked up once
        return vars(sys.modules[package]).setdefault(name, load(path))

    def __dir__() -> list[str]:
        return list(places())

    return __getattr__, __dir__


def after_import(name: str, act: Callable[[], None]) -> None:
    """Do it once a module is imported: now, where it is, or right behind its import.

    Example:
        >>> after_import("sys", lambda: print("is there"))
        is there
    """
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _After(name, act))


class _After(MetaPathFinder):
    """Finds a module as the others do, and acts when it has run; then it goes."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                del loader.exec_module
                sys.meta_path.remove(self)
                self.act()

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def load(path: str) -> Any:
    """What stands at a dotted path. The only way below the rooms to what is in them, for names that the catalog lists."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
