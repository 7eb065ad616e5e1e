"""Tables with a text, an image or a sound per row: txt, CSV, JSONL, Parquet, Arrow, folders saved by `datasets`."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from cenote.core import InputError
from cenote.core.files import inside, read_regular
from cenote.core.memory import MAX_ITEM_SIZE
from cenote.features import arrow
from cenote.features.raw.decode import require_affordable
from cenote.features.raw.files import CHECK, DECODE
from cenote.features.raw.items import Item, Kind, RawItems, Read, UnreadableError, digest_of
from cenote.features.splits import WORDS
from cenote.features.table import GROUP_NAME, ID_NAMES, LABEL_NAMES, SPLIT_NAME, Column, find, is_missing, read_csv
from cenote.features.validate import some

LINES, CSV, JSONL = (".txt",), (".csv", ".tsv"), (".jsonl", ".ndjson")
SUFFIXES = LINES + CSV + JSONL + arrow.SUFFIXES
BARE = "@"
"""Before number and count of columns, where a file has no names for them."""
TEXT_NAMES = ("text", "sentence", "content", "document", "review")


@dataclass(frozen=True)
class TextItem(Item):
    """A text, and the cell of a table that it comes from."""

    id: str
    text: str | None
    path: Path
    column: str
    row: int

    def read(self) -> Read:
        if self.text is None or not self.text.strip():
            raise UnreadableError("holds no text")
        try:
            return Read(self.text, digest_of(self.text.encode()))
        except UnicodeEncodeError as error:
            raise UnreadableError(f"holds half a character, {self.text[error.start]!a}") from error

    def stamp(self) -> str:
        return "missing" if self.text is None else digest_of(self.text.encode("utf-8", "surrogatepass")).hex()

    def location(self) -> str:
        return f"{self.path.absolute()}#{self.column}/{self.row}"


@dataclass(frozen=True)
class CellItem(Item):
    """An image or a sound that lies, as a file's bytes, in a cell of an Arrow or Parquet file; it may take so many bytes."""

    id: str
    path: Path
    column: str
    row: int
    kind: Kind
    most: int = MAX_ITEM_SIZE

    def _bytes(self) -> bytes:
        try:
            if not self.path.is_file():
                raise FileNotFoundError(2, "there is no such table")
            cell = _cell(self.path, self.column, self.row)
        except OSError as error:
            raise UnreadableError(f"lies in {self.path}, which cannot be read: {error.strerror or error}") from error
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None and isinstance(cell, dict) and cell.get("path"):
            try:
                file = inside(self.path.parent, cell["path"])
                require_affordable(file.stat().st_size, self.most, "is a large file")
                return read_regular(file)
            except ValueError as error:
                raise UnreadableError(f"lies elsewhere: {error}; store its bytes in the table") from error
            except OSError as error:
                raise UnreadableError(
                    f"lies in {cell['path']}, which cannot be read: {error.strerror or error}"
                ) from error
        if data is None:
            raise UnreadableError("is missing: its cell is empty")
        return bytes(data)

    def read(self) -> Read:
        data = self._bytes()
        return Read(DECODE[self.kind](data, self.most), digest_of(data))

    def check(self) -> None:
        CHECK[self.kind](self._bytes(), self.most)

    def limited(self, most: int) -> Item:
        return replace(self, most=most)

    def stamp(self) -> str:
        try:
            return str(len(self._bytes()))
        except UnreadableError:
            return "missing"

    def location(self) -> str:
        return f"{self.path.absolute()}#{self.column}/{self.row}"

    def changed(self, digest: bytes) -> bool:
        try:
            return digest_of(self._bytes()) != digest
        except UnreadableError:
            return True


def bytes_at(location: str, size: int | None = None) -> bytes:
    """What lies where an item says that it does, in a file of its own or in a cell of a table.

    Args:
        location: as the item gave it.
        size: that the bytes had; of a file that has another, none are read.

    Raises:
        UnreadableError: where nothing lies there any more, or no file.
    """
    table, column, row = _place(location)
    try:
        if Path(location).is_file() or row is None:
            return read_regular(Path(location), size)
        return CellItem(location, table, column, row, "image")._bytes()
    except (OSError, InputError, KeyError, IndexError, ValueError) as error:
        raise UnreadableError(f"cannot be read: {error}") from error


def _place(location: str) -> tuple[Path, str, int | None]:
    """Table, column and row; no row where the location is that of a file."""
    table, _, cell = location.rpartition("#")
    column, _, row = cell.rpartition("/")
    return Path(table), column, int(row) if row.isdecimal() and len(row) < 19 else None


def text_at(location: str) -> str:
    """The text that stands in a cell.

    Raises:
        UnreadableError: where no text stands there any more.
    """
    file, column, row = _place(location)
    try:
        if row is None or not file.is_file() or file.suffix.lower() not in SUFFIXES:
            raise ValueError("there is no such table")
        if file.suffix.lower() in arrow.SUFFIXES:
            return str(_cell(file, column, row))
        return str(_texts(file, column, file.stat().st_mtime_ns)[row])
    except (OSError, InputError, KeyError, IndexError, ValueError) as error:
        raise UnreadableError(f"{location} cannot be read: {error}") from error


def table_files(path: Path) -> list[tuple[Path, str | None]]:
    """The tables of a file or folder, each with the split that its name gives it."""
    saved = arrow.shards_of(path)
    if saved:
        return [(shard.path, shard.split) for shard in saved]
    if path.is_file():
        return [(path, None)] if path.suffix.lower() in SUFFIXES else []
    found = [
        f for f in sorted(path.glob("*")) if f.suffix.lower() in LINES + CSV + JSONL and not f.name.startswith(".")
    ]
    return [(f, f.stem.lower() if f.stem.lower() in WORDS and not f.stem.isdigit() else None) for f in found]


def open_table(
    path: Path,
    *,
    kind: str | None = None,
    column: str | None = None,
    names: Sequence[str] | None = None,
    id_column: str | None = None,
) -> RawItems:
    """The items of a table, or of a folder of tables with the same columns.

    Args:
        path: a file or folder; of files called train, dev, test, ... the name gives the split.
        kind: of the items, where columns of several kinds are there.
        column: the one with the text, image or sound; default: the only one that can be it.
        names: of the columns of CSV files that have no header line.
        id_column: default `id`, ..., else items are numbered.

    Raises:
        InputError: where a file cannot be read, or no column, or several, can be meant.
    """
    files = table_files(path)
    if not files:
        raise InputError(f"{path}: is no {', '.join(SUFFIXES)} file, and no folder of such files")
    suffixes = sorted({file.suffix.lower() for file, _ in files})
    if names is not None and not set(suffixes) & set(CSV):
        raise InputError(f"names: only CSV files come without the names of their columns; {path} is {suffixes[0]}")
    tables = [_read(file, names) for file, _ in files]
    for (file, _), table in zip(files[1:], tables[1:], strict=True):
        if list(table) != list(tables[0]):
            raise InputError(
                f"{file}: its columns {', '.join(table)} differ from those of {files[0][0].name}, {', '.join(tables[0])}; "
                f"put only files of one data set into a folder"
            )
    kinds = _media_columns(files[0][0])
    chosen = _chosen(path, tables[0], kinds, column, kind)
    lengths = [_rows(file, table) for (file, _), table in zip(files, tables, strict=True)]
    plain = {n: [c for t in tables for c in t[n]] for n in tables[0] if n != chosen and n not in kinds}
    if all(split is not None for _, split in files) and SPLIT_NAME not in plain:
        plain[SPLIT_NAME] = [split for (_, split), rows in zip(files, lengths, strict=True) for _ in range(rows)]
    id_name = find(plain, id_column, ID_NAMES, "id_column")
    ids = [str(i) for i in range(sum(lengths))] if id_name is None else [str(c) for c in plain[id_name]]
    if set(suffixes) & set(JSONL):
        _check_characters(path, plain)
    items: list[Item] = []
    if chosen in kinds:
        places = [(file, row) for (file, _), rows in zip(files, lengths, strict=True) for row in range(rows)]
        items += [CellItem(i, file, chosen, row, kinds[chosen]) for i, (file, row) in zip(ids, places, strict=True)]
    else:
        bare = names is not None and files[0][0].suffix.lower() in CSV
        place = f"{BARE}{list(tables[0]).index(chosen)}:{len(tables[0])}" if bare else chosen
        cells = [(file, row, c) for (file, _), t in zip(files, tables, strict=True) for row, c in enumerate(t[chosen])]
        odd = next((cell for cell in cells if isinstance(cell[2], list | dict)), None)
        if odd is not None:
            inside = "a list" if isinstance(odd[2], list) else f"an object of {some(odd[2])}"
            raise InputError(
                f"column: {chosen!r} of {odd[0]} holds {inside} in row {odd[1]}, expected a text; name another column, or "
                f"make one of texts"
            )
        items += [
            TextItem(i, None if is_missing(c) else str(c), file, place, row)
            for i, (file, row, c) in zip(ids, cells, strict=True)
        ]
    return RawItems(
        kinds.get(chosen, "text"),
        f"column {chosen} of {len(files)} {', '.join(suffixes)} file{'s' if len(files) > 1 else ''}",
        items,
        plain,
        class_names=_class_names(files[0][0]),
        used=frozenset() if id_name is None else frozenset({id_name}),
    )


def _read(file: Path, names: Sequence[str] | None) -> dict[str, Column]:
    suffix = file.suffix.lower()
    if suffix in LINES:
        # not splitlines, which also ends lines at characters that stand in texts
        return {"text": [line for line in _text(file).split("\n") if line.strip()]}
    if suffix in CSV:
        return dict(read_csv(file, names))
    if suffix in JSONL:
        return _json_lines(file)
    media = _media_columns(file)
    with arrow.told(file):
        table = _table(
            file, [n for n in _schema(file).names if n not in media and _is_plain(_schema(file).field(n).type)]
        )
        found: dict[str, Column] = {n: table.column(n).to_pylist() for n in table.column_names}
    return found | dict.fromkeys(media, ())


def _rows(file: Path, table: dict[str, Column]) -> int:
    if file.suffix.lower() in arrow.SUFFIXES:
        return _row_count(file)
    return len(next(iter(table.values())))


def _chosen(path: Path, table: dict[str, Column], kinds: dict[str, Kind], wanted: str | None, kind: str | None) -> str:
    if wanted is not None:
        if wanted not in table:
            raise InputError(f"column: {path} has no column {wanted!r}; its columns are {', '.join(table)}")
        return wanted
    if kind is not None:
        kinds = {name: of for name, of in kinds.items() if of == kind}
    if len(kinds) == 1:
        return next(iter(kinds))
    for name in TEXT_NAMES:
        if name in table and not kinds:
            return name
    known = {*ID_NAMES, *LABEL_NAMES, SPLIT_NAME, GROUP_NAME}
    texts = [n for n, cells in table.items() if n not in known and any(isinstance(c, str) for c in cells)]
    if len(texts) == 1 and not kinds:
        return texts[0]
    raise InputError(
        f"column: {path} has {'several columns' if texts or kinds else 'no column'} that may hold the items; its columns are "
        f"{some(table) or 'none of texts, numbers, images or sounds'}; name one, or, of a CSV file without a header line, "
        f"all of them with names"
    )


def _check_characters(path: Path, columns: Mapping[str, Column]) -> None:
    """JSON can hold halves of characters, which nothing else can."""
    for name, cells in columns.items():
        for row, cell in enumerate(cells):
            if isinstance(cell, str):
                try:
                    cell.encode()
                except UnicodeEncodeError as error:
                    raise InputError(
                        f"{path}: column {name!r} holds half a character, {cell[error.start]!a}, in row {row}; correct it"
                    ) from error


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _json_lines(file: Path) -> dict[str, Column]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file}, line {number}: is not JSON ({error}); expected an object on each line: correct it or take it out"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{file}, line {number}: expected an object with named values, got {line[:40]!r}; write one on each line"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{file}: holds no item")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _is_plain(kind: Any) -> bool:
    return bool(arrow.holds_cells(kind))


def _schema(file: Path) -> Any:
    return arrow.File(file).schema


def _row_count(file: Path) -> int:
    return int(arrow.File(file).rows())


def _class_names(file: Path) -> dict[str, list[str]]:
    return arrow.class_names(_schema(file)) if file.suffix.lower() in arrow.SUFFIXES else {}


def _media_columns(file: Path) -> dict[str, Kind]:
    """Columns of images and sounds, as `datasets` keeps them: the bytes of a file, and its path."""
    if file.suffix.lower() not in arrow.SUFFIXES:
        return {}

    schema = _schema(file)
    told = arrow.huggingface_features(schema)
    found: dict[str, Kind] = {}
    for field in schema:
        kind = told.get(field.name, {}).get("_type") if isinstance(told.get(field.name), dict) else None
        if kind in ("Image", "Audio"):
            found[field.name] = "image" if kind == "Image" else "audio"
        elif _holds_files(field.type):
            found[field.name] = "audio" if "audio" in field.name.lower() else "image"
    return found


def _holds_files(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {f.name for f in kind} == {"bytes", "path"}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _table(file: Path, columns: list[str], group: int | None = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() in arrow.PARQUET:
        if group is None:
            return pq.read_table(file, columns=columns)
        with pq.ParquetFile(file) as opened:
            return opened.read_row_group(group, columns=columns)
    mapped = pa.memory_map(str(file))
    try:
        return pa.ipc.open_file(mapped).read_all().select(columns)
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all().select(columns)


def _cell(file: Path, column: str, row: int) -> Any:
    group, changed = None, file.stat().st_mtime_ns
    if file.suffix.lower() in arrow.PARQUET:
        # a file may be larger than the memory: no more of it than the rows that are stored together
        ends = _ends(file, changed)
        group = bisect_right(ends, row)
        row -= ends[group - 1] if group else 0
    return _column(file, column, group, changed)[row].as_py()


@lru_cache(maxsize=1)
def _texts(file: Path, column: str, changed: int) -> Column:
    del changed
    number, _, count = column.removeprefix(BARE).partition(":")
    if column.startswith(BARE) and number.isdecimal() and count.isdecimal():
        return _read(file, [str(i) for i in range(int(count))])[number]
    return _read(file, None)[column]


@lru_cache(maxsize=64)
def _ends(file: Path, changed: int) -> list[int]:
    import pyarrow.parquet as pq

    del changed  # a file that was written anew is read anew
    with arrow.told(file), pq.ParquetFile(file) as opened:
        held = opened.metadata
        return list(accumulate(held.row_group(i).num_rows for i in range(held.num_row_groups)))


@lru_cache(maxsize=4)
def _column(file: Path, column: str, group: int | None, changed: int) -> Any:
    del changed
    with arrow.told(file):
        return _table(file, [column], group).column(column)
