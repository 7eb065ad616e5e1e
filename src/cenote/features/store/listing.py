"""`items.parquet` of a feature store: names, labels, splits and groups of the items, beside the shards, free to be joined."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cenote.core import InputError
from cenote.features.raw.items import RawItems
from cenote.features.table import Column
from cenote.features.validate import some

LISTING = "items.parquet"
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
    table = pa.table(arrays).replace_schema_metadata(about)
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
        table = pq.read_table(path)
        about = table.schema.metadata or {}
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        return Listing(
            columns.pop(ID),
            columns.pop(STAMP),
            columns.pop(FILE, None),
            columns,
            json.loads(about[b"cenote.class_names"]),
            frozenset(json.loads(about[b"cenote.used"])).intersection(columns),
        )
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        why = "is lost" if isinstance(error, FileNotFoundError) else f"is damaged ({str(error).splitlines()[0]})"
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


def _array(cells: Column) -> Any:
    import pyarrow as pa

    try:
        return pa.array(list(cells))
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if cell is None else str(cell) for cell in cells], pa.string())
