"""Which source code a result follows from, found by reading it: a digest that changes when that code does."""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import re
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ALWAYS = ("torch", "numpy")
"""Distributions whose version counts, whether the sources name them or not."""

OWN = __name__.partition(".")[0]

DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Of modules that are called otherwise than their distribution; others are looked up, which reads all that is installed."""


class Import(NamedTuple):
    """`import module`, or `from module import name`."""

    module: str
    name: str | None


class Source(NamedTuple):
    """One file, read.

    Attributes:
        digest: of its bytes.
        imports: what it imports, in functions too, but not `if TYPE_CHECKING`.
        bound: the name here -> where it is from, of what it imports; `if TYPE_CHECKING` too, under which a package says where
            it finds names later.
    """

    digest: str
    imports: tuple[Import, ...]
    bound: dict[str, Import]


def source_digest(*roots: type | ModuleType | Any) -> str:
    """SHA-256 over the files of some classes, functions or modules, and over all of their packages that these import.

    Imports are read, never run. A name that a package only passes on (`from cenote.core import InputError`), or finds later and
    lists in its stub or under `if TYPE_CHECKING` (`from cenote.pool import SimPool`, `from cenote.core import Bags`), leads to
    the file that it is from: the other files of the package do not count. Of other people's distributions, and of torch and
    numpy, the version counts, but not what hardware a build is for; a module that belongs to no distribution counts by its
    source. Each file is read once in a process.

    Returns:
        The digest; a new one each time where some source is in no file (a notebook): such results are never found again.

    Example:
        >>> from cenote.compare import pareto
        >>> source_digest(pareto) == source_digest(pareto.pareto)
        True
    """
    found: dict[str, str] = {}
    others: set[str] = set(ALWAYS)
    todo: list[tuple[str, Path, Path]] = []
    homes: dict[str, Path] = {OWN: Path(__file__).parents[2]}
    for root in roots:
        module = root if isinstance(root, ModuleType) else sys.modules.get(getattr(root, "__module__", ""))
        file = getattr(module, "__file__", None)
        if module is None or file is None or not Path(file).is_file():
            return uuid.uuid4().hex
        name, path = _placed(module, Path(file))
        home = _home(name, path)
        homes[name.partition(".")[0]] = home
        todo.append((name, path, home))
    while todo:
        name, path, home = todo.pop()
        if name in found:
            continue
        source = _read(path)
        found[name] = source.digest
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for imported in source.imports:
            module_name = _absolute(imported.module, package)
            top = module_name.partition(".")[0]
            if top in sys.stdlib_module_names or not top:
                continue
            if top not in homes and _version(top) is None:
                alone = _alone(top, home)
                if alone is not None:
                    homes[top] = alone
            if top in homes:
                todo += _targets(Import(module_name, imported.name), homes[top])
            else:
                others.add(top)
    versions = {top: _version(top) or "none" for top in others}
    return hashlib.sha256(json.dumps([found, versions], sort_keys=True).encode()).hexdigest()


def _placed(module: ModuleType, path: Path) -> tuple[str, Path]:
    """Its name and file; a script has the name of its file."""
    return (path.stem if module.__name__ == "__main__" else module.__name__), path


def _home(name: str, path: Path) -> Path:
    """The folder that its top-level package lies in."""
    parts = len(name.split(".")) - (path.name != "__init__.py")
    folder = path.parent
    for _ in range(parts):
        folder = folder.parent
    return folder if _file(name, folder) == path else path.parent


def _alone(top: str, home: Path) -> Path | None:
    """Where a module lies that no distribution brought: beside those that import it, or somewhere on the path."""
    if _file(top, home) is not None:
        return home
    spec = importlib.machinery.PathFinder.find_spec(top)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    return path.parent.parent if path.name == "__init__.py" else path.parent


@cache
def _targets(imported: Import, home: Path) -> tuple[tuple[str, Path, Path], ...]:
    """The file that an import leads to, if any, with its module and home."""
    module, name = imported
    seen: set[Import] = set()
    while name is not None and Import(module, name) not in seen:
        seen.add(Import(module, name))
        path = _file(module, home)
        if path is None or path.name != "__init__.py":
            break
        passed_on = _passed_on(path, name)
        if passed_on is None:
            part = _file(f"{module}.{name}", home)
            if part is not None:
                return ((f"{module}.{name}", part, home),)
            break
        # a package that passes on what is not its own is the end of the way
        onward = _absolute(passed_on.module, module)
        if _file(onward, home) is None:
            break
        module, name = onward, passed_on.name
    path = _file(module, home)
    return () if path is None else ((module, path, home),)


def _passed_on(package: Path, name: str) -> Import | None:
    """Where a package has a name from; one that finds its names when they are asked for lists them in its stub."""
    stub = package.with_suffix(".pyi")
    return _read(package).bound.get(name) or (_read(stub).bound.get(name) if stub.is_file() else None)


@cache
def _file(module: str, home: Path) -> Path | None:
    stem = home.joinpath(*module.split("."))
    package, single = stem / "__init__.py", stem.with_name(f"{stem.name}.py")
    return package if package.is_file() else single if single.is_file() else None


def _absolute(module: str, package: str) -> str:
    level = len(module) - len(module.lstrip("."))
    if not level:
        return module
    base = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*base, module[level:]]).rstrip(".")


@cache
def _version(top: str) -> str | None:
    try:
        return _without_build(version(DISTRIBUTIONS.get(top, top)))
    except PackageNotFoundError:
        if importlib.machinery.PathFinder.find_spec(top) is None:
            return None
    names = _distributions().get(top)
    return ", ".join(f"{n} {_without_build(version(n))}" for n in sorted(set(names))) if names else None


def _without_build(version: str) -> str:
    """A version without the hardware that it was built for: the source is the same.

    >>> _without_build("2.13.0+cpu"), _without_build("2.13.0+cu126"), _without_build("1.2.dev3+g1a2b3c")
    ('2.13.0', '2.13.0', '1.2.dev3+g1a2b3c')
    """
    return re.sub(r"\+(cpu|cu\d+|rocm[\d.]+|xpu)$", "", version)


@cache
def _distributions() -> dict[str, list[str]]:
    return {top: list(names) for top, names in packages_distributions().items()}


@cache
def _read(path: Path) -> Source:
    content = path.read_bytes()
    imports: list[Import] = []
    bound: dict[str, Import] = {}
    tree = ast.parse(content)
    for statement, runs in _statements(tree.body):
        if isinstance(statement, ast.Import) and runs:
            imports += [Import(alias.name, None) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            module = "." * statement.level + (statement.module or "")
            for alias in statement.names:
                found = Import(module, None if alias.name == "*" else alias.name)
                imports += [found] if runs else []
                bound[alias.asname or alias.name] = found
    return Source(hashlib.sha256(content).hexdigest(), tuple(imports), bound)


def _statements(body: list[Any], runs: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Those of a file, in blocks too, and whether they are run; expressions hold no imports and are not looked at."""
    for statement in body:
        yield statement, runs
        only_for_types = isinstance(statement, ast.If) and _only_for_types(statement.test)
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _statements(getattr(statement, block, []), runs and not (only_for_types and block == "body"))


def _only_for_types(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"
