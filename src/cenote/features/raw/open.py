"""`open_raw`: whatever raw data people have on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from cenote.core import InputError
from cenote.core.memory import MAX_ITEM_SIZE
from cenote.core.requirements import require_one_of, require_positive, require_several
from cenote.features import arrow
from cenote.features.raw.files import SUFFIXES, files_below, kinds_of_files, media_files, open_media
from cenote.features.raw.items import Kind, RawItems
from cenote.features.raw.tables import SUFFIXES as TABLES
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
    max_item_size: int = MAX_ITEM_SIZE,
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
        max_item_size: bytes that an image or a sound may take in memory, by its header; one that takes more cannot be read.

    Raises:
        InputError: naming what cannot be used.
    """
    where = Path(path)
    if not where.exists():
        raise InputError(f"data: there is no file or folder {where}")
    if kind is not None:
        require_one_of(get_args(Kind), kind=kind)
    if names is not None:
        require_several(names=names)
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1 item, got {limit}")
    require_positive(max_item_size=max_item_size)
    csv = None if labels is None else Path(labels)
    if where.is_dir() and (where / "manifest.json").is_file() and (where / "shards").is_dir():
        raise InputError(f"data: {where} is a feature store already; probe it as it is, without a model")
    below = files_below(where) if where.is_dir() else []
    media = {kind: found for kind in SUFFIXES if (found := len(media_files(below, kind)))}
    if kind is None and len(media) > 1:
        held = ", ".join(f"{count} {name}" for name, count in media.items())
        raise InputError(f"data: {where} holds {held}; name one with kind")
    chosen = kind if kind in media else None if kind is not None or not media else next(iter(media))
    if chosen is not None:
        for argument, given in (("column", column), ("names", names)):
            if given is not None:
                raise InputError(
                    f"{argument}: {where} is a folder of {chosen} files, which have no columns; leave it out"
                )
        items = open_media(where, below, chosen, csv, id_column)
    else:
        tables = [file for file, _ in table_files(where)]
        if kind in SUFFIXES and where.is_dir():
            # files of text hold neither images nor sounds
            tables = [file for file in tables if file.suffix.lower() in arrow.SUFFIXES]
        if not tables:
            raise InputError(f"data: {_unreadable(where, below, kind)}")
        items = open_table(where, kind=kind, column=column, names=names, id_column=None if csv else id_column)
        if csv is not None:
            items = _joined(items, csv, id_column)
        if kind is not None and items.kind != kind:
            raise InputError(
                f"kind: {where} was to hold {kind}, but {items.format} is {items.kind}; name another column"
            )
    if not len(items):
        raise InputError(f"data: {where} holds no item")
    problems = Problems(str(where))
    check_ids([item.id for item in items.items], problems)
    problems.raise_any()
    items = items if limit is None else items.only(range(min(limit, len(items))))
    return items if max_item_size == MAX_ITEM_SIZE else items.limited(max_item_size)


def _unreadable(where: Path, below: Sequence[Path], kind: str | None) -> str:
    """Why nothing can be made of a file or folder, and what can be done."""
    if where.is_file():
        suffix = where.suffix.lower()
        if any(suffix in of_kind for of_kind in SUFFIXES.values()):
            return f"{where} is a single file; name the folder that it lies in"
        hint = {".json": "; write a line per object and call it .jsonl", ".xlsx": "; save it as CSV"}.get(suffix, "")
        return f"{where} is no {', '.join(TABLES)} file{hint}"
    lower = [f for f in below if f.suffix.lower() in TABLES]
    if lower and (kind is None or kind == "text"):
        return (
            f"the tables and texts of {where} lie in its subfolders ({lower[0].relative_to(where)}, ...); name one of these "
            f"folders, or make one table of them, with a line per item: text,label"
        )
    held = kinds_of_files(list(below)) or "no file"
    wanted = ", ".join(SUFFIXES[kind]) if kind in SUFFIXES else ", ".join(s for of in SUFFIXES.values() for s in of)
    return f"{where} holds nothing that can be read ({held}); expected {wanted}" + (
        "" if kind in SUFFIXES else f", {', '.join(TABLES)}"
    )


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
