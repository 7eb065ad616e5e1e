"""`items.parquet` of a feature store: names, labels, splits and groups of the items, beside the shards, free to be joined."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cenote.core.files as files
from cenote.core import InputError
from cenote.features.raw.items import RawItems
from cenote.features.table import Column
from cenote.features.validate import some

LISTING = "items.parquet"
DIGEST = "cenote.sha256"
ID, STAMP, FILE = "id", "stamp", "cenote.file"


@dataclass(frozen=True)
class Listing:
    """What was extracted from.

    Attributes:
        ids, stamps: of all items, unreadable ones included.
        files: where each item lay when the store was last written, in a file of its own or in a table.
        columns: labels and the like.
        class_names, used: as in `RawItems`.
    """

    ids: list[str]
    stamps: list[str]
    files: list[str] | None
    columns: Mapping[str, Column]
    class_names: Mapping[str, list[str]]
    used: frozenset[str]


def write_listing(store: Path, items: RawItems) -> None:
    """Write the file in one step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {ID: [item.id for item in items.items], STAMP: [item.stamp() for item in items.items]}
    files = [item.location() for item in items.items]
    if None not in files:
        columns[FILE] = [str(file) for file in files]
    kept = {name: cells for name, cells in items.columns.items() if name not in columns}
    arrays = {name: pa.array(cells, pa.string()) for name, cells in columns.items()}
    arrays |= {name: _array(cells) for name, cells in kept.items()}
    about = {"cenote.class_names": json.dumps(dict(items.class_names)), "cenote.used": json.dumps(sorted(items.used))}
    table = pa.table(arrays)
    table = table.replace_schema_metadata({**about, DIGEST: _digest(table, about)})
    store.mkdir(parents=True, exist_ok=True)
    temporary = store / f".{LISTING}-{os.getpid()}"
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, store / LISTING)
    except OSError as error:
        raise InputError(f"{store / LISTING}: could not be written ({error.strerror or error}); make room") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_listing(store: Path) -> Listing:
    """The items of a store.

    Raises:
        InputError: where the file is lost or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = store / LISTING
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
        about = {str(k, "utf-8"): str(v, "utf-8") for k, v in (table.schema.metadata or {}).items()}
        digest = about.pop(DIGEST, None)
        if digest is None:
            files.unchecked(path)
        elif digest != _digest(table, about):
            raise ValueError("it was changed after it was written: its digest is another one")
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        return Listing(
            columns.pop(ID),
            columns.pop(STAMP),
            columns.pop(FILE, None),
            columns,
            json.loads(about["cenote.class_names"]),
            frozenset(json.loads(about["cenote.used"])).intersection(columns),
        )
    except (pa.ArrowException, OSError, KeyError, ValueError, OverflowError, TypeError, RecursionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        why = "is lost" if isinstance(error, FileNotFoundError) else f"is damaged ({said})"
        raise InputError(f"{path}: {why}; run the same cenote extract again: finished shards are kept") from error


def changes(before: Listing, items: RawItems) -> str:
    """In words, how the items differ from those of a store; empty where they do not."""
    old = dict(zip(before.ids, before.stamps, strict=True))
    new = {item.id: item.stamp() for item in items.items}
    gone, come = [i for i in old if i not in new], [i for i in new if i not in old]
    other = [i for i in new if i in old and old[i] != new[i]]
    parts = [
        f"{len(found)} {what} ({some(map(repr, found))})"
        for found, what in ((gone, "gone"), (come, "new"), (other, "changed"))
        if found
    ]
    if not parts and before.ids != [item.id for item in items.items]:
        parts.append("in another order")
    return ", ".join(parts)


def _digest(table: Any, about: Mapping[str, str]) -> str:
    """Over all cells, their types, and what is said of them."""
    digest = hashlib.sha256(json.dumps([dict(about), [str(kind) for kind in table.schema.types]]).encode())
    for name in table.column_names:
        digest.update(json.dumps([name, table.column(name).to_pylist()], default=str).encode())
    return digest.hexdigest()


def _array(cells: Column) -> Any:
    import pyarrow as pa

    try:
        return pa.array(list(cells))
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if cell is None else str(cell) for cell in cells], pa.string())
