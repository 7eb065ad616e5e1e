"""Modules under the names that they once had: saved models name the module of their class, and so do people's programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType


class Moved:
    """Finds modules by the names that they once had; what is found is the module itself.

    Args:
        names: old name -> new name; the modules inside a package move with it.

    Example:
        >>> import sys
        >>> from importlib import import_module
        >>> sys.meta_path.insert(0, Moved({"ancient_json": "json"}))
        >>> import_module("ancient_json.decoder") is import_module("json.decoder")
        True
        >>> _ = sys.meta_path.pop(0)
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, _path: Iterable[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As `importlib` asks for it."""
        if self.new_name(name) is None:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module under its new name."""
        new = self.new_name(spec.name)
        assert new is not None
        module = import_module(new)
        # importlib is about to write the old name's spec over it
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has been run."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def new_name(self, name: str) -> str | None:
        """Of a module that moved, or whose package did."""
        for old, new in self.names.items():
            if name == old or name.startswith(f"{old}."):
                return new + name.removeprefix(old)
        return None
