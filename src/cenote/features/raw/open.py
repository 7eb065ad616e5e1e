"""`open_raw`: whatever raw data people have on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from cenote.core import InputError
from cenote.features.raw.files import media_files, open_media
from cenote.features.raw.items import Kind, RawItems
from cenote.features.raw.tables import open_table, table_files
from cenote.features.table import ID_NAMES, Column, find, read_csv
from cenote.features.validate import Problems, check_ids


def open_raw(
    path: str | Path,
    *,
    kind: str | None = None,
    labels: str | Path | None = None,
    column: str | None = None,
    names: Sequence[str] | None = None,
    id_column: str | None = None,
    limit: int | None = None,
) -> RawItems:
    """List raw items; nothing but names, sizes and, of texts, the texts is read.

    Args:
        path: a folder of images or sounds (labels from its subfolders, `labels.csv` or `labels`); a txt (one text a line),
            CSV, TSV, JSONL, Parquet or Arrow file, a folder of such files, or one saved by `datasets.save_to_disk`.
        kind: image, audio or text, where a folder holds several.
        labels: CSV file with labels, matched by id.
        column: of a table, the one with the text, image or sound.
        names: of the columns of CSV files that have no header line.
        id_column: default `id`, `file`, ...
        limit: only so many items, the first ones.

    Raises:
        InputError: naming what cannot be used.
    """
    where = Path(path)
    if not where.exists():
        raise InputError(f"data: there is no file or folder {where}")
    if kind is not None and kind not in get_args(Kind):
        raise InputError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1 item, got {limit}")
    csv = None if labels is None else Path(labels)
    found = _kinds(where)
    chosen = kind or (next(iter(found)) if len(found) == 1 else None)
    if chosen is None or (kind is not None and found and kind not in found and "table" not in found):
        held = ", ".join(f"{count} {name}" for name, count in found.items()) or "nothing that can be read"
        raise InputError(
            f"data: {where} holds {held}; "
            + ("name one with kind" if len(found) > 1 else "expected image, audio or text")
        )
    if where.is_dir() and chosen in ("image", "audio") and chosen in found:
        items = open_media(where, chosen, csv, id_column)  # type: ignore[arg-type]
    else:
        items = open_table(where, column=column, names=names, id_column=None if csv else id_column)
        if csv is not None:
            items = _joined(items, csv, id_column)
    problems = Problems(str(where))
    check_ids([item.id for item in items.items], problems)
    problems.raise_any()
    return items if limit is None else _first(items, limit)


def _kinds(path: Path) -> dict[str, int]:
    if path.is_file():
        return {"table": 1}
    counts = {"image": len(media_files(path, "image")), "audio": len(media_files(path, "audio"))}
    if not any(counts.values()):
        counts["table"] = len(table_files(path))
    return {name: count for name, count in counts.items() if count}


def _first(items: RawItems, limit: int) -> RawItems:
    columns: dict[str, Column] = {name: cells[:limit] for name, cells in items.columns.items()}
    return RawItems(items.kind, items.format, items.items[:limit], columns, items.class_names, items.used)


def _joined(items: RawItems, labels: Path, id_column: str | None) -> RawItems:
    table = read_csv(labels)
    id_name = find(table, id_column, ID_NAMES, "id_column")
    if id_name is None:
        raise InputError(
            f"id_column: {labels} has no column called {', '.join(ID_NAMES)}; its columns are {', '.join(table)}"
        )
    problems = Problems(str(labels))
    check_ids(table[id_name], problems)
    row_of = {name: row for row, name in enumerate(table[id_name])}
    for item in items.items:
        if item.id not in row_of:
            problems.add("no row", f"item {item.id!r} has no row; add one or leave the item out")
    problems.raise_any()
    rows = [row_of[item.id] for item in items.items]
    columns: dict[str, Column] = {name: [cells[row] for row in rows] for name, cells in table.items()}
    return RawItems(items.kind, items.format, items.items, columns, used=frozenset({id_name}))
