"""Finished cells on disk: one file per arm holds its numbers and its tensors.

A cell is believed only if it is whole and its key matches: same data, same settings, same seeds, same code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxtyping import Float
from torch import Tensor

import cenote.core.files as files

FLOAT = "float"
"""The one field of what stands in a record for a number that JSON has no word for."""


@dataclass(frozen=True)
class Cell:
    """One arm, measured.

    Attributes:
        name: of the arm.
        record: numbers and texts that go into JSON.
        tensors: by names that the job gives; `scores` are what is judged.
    """

    name: str
    record: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scores(self) -> Float[Tensor, "seeds units *outputs"]:
        """What the metric is computed from."""
        return self.tensors["scores"]

    def with_record(self, **more: Any) -> Cell:
        """The same cell, with more in its record."""
        return replace(self, record={**self.record, **more})


class Cells:
    """The folder that keeps them.

    Args:
        folder: made when the first cell is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """The file of an arm's cell, whatever the arm is called."""
        return self.folder / f"{quote(name, safe='@+=,() ')}.safetensors"

    def save(self, key: str, cell: Cell) -> None:
        """Write a cell in one step."""
        save_cell(self.path(cell.name), key, cell)

    def load(self, name: str, key: str) -> Cell | None:
        """See `load_cell`."""
        return load_cell(self.path(name), key)


def cell_key(parts: Mapping[str, Any]) -> str:
    """Text that changes whenever one of the parts does.

    >>> cell_key({"seeds": (0, 1)}) == cell_key({"seeds": [0, 1]})
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save_cell(path: Path, key: str, cell: Cell) -> None:
    """Write a cell in one step."""
    record = json.dumps(_spelled(cell.record), allow_nan=False)
    files.write_tensors(path, cell.tensors, {"key": key, "name": cell.name, "record": record})


def load_cell(path: Path, key: str) -> Cell | None:
    """The cell, or `None` where there is none, it is damaged, or it answers another question."""
    if not path.is_file():
        return None
    try:
        stored = files.read_tensors(path, old=False)
        if stored.metadata.get("key") != key:
            return None
        found = json.loads(stored.metadata["record"], object_hook=_read)
        return Cell(stored.metadata["name"], found, stored.tensors) if isinstance(found, dict) else None
    except (OSError, KeyError, ValueError, RecursionError):
        return None


def _spelled(value: Any) -> Any:
    """JSON has no word for what is not known or infinite, and a cell must come back as it was."""
    if isinstance(value, Mapping):
        return {k: _spelled(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(v) for v in value]
    return {FLOAT: str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _read(found: dict[str, Any]) -> Any:
    """Inverse of `_spelled`, of one object.

    >>> _read(_spelled(float("-inf")))
    -inf
    """
    return float(found[FLOAT]) if found.keys() == {FLOAT} else found
