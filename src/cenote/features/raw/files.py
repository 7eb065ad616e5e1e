"""Folders with one image or one sound per file; labels from subfolders or a CSV file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cenote.core import InputError
from cenote.features.folder import matched
from cenote.features.raw.decode import check_image, decode_audio, decode_image
from cenote.features.raw.items import Item, Kind, RawItems, Read, UnreadableError, digest_of
from cenote.features.splits import WORDS
from cenote.features.table import ID_NAMES, Column, find, read_csv
from cenote.features.validate import Problems, check_ids

LABELS = "labels.csv"
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"),
}
DECODE: dict[Kind, Callable[[bytes], Any]] = {"image": decode_image, "audio": decode_audio}
CHECK: dict[Kind, Callable[[bytes], Any]] = {"image": check_image, "audio": decode_audio}


@dataclass(frozen=True)
class FileItem(Item):
    """An image or a sound in a file of its own."""

    id: str
    path: Path
    kind: Kind

    def read(self) -> Read:
        data = self._bytes()
        return Read(DECODE[self.kind](data), digest_of(data))

    def check(self) -> None:
        CHECK[self.kind](self._bytes())

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UnreadableError(f"cannot be read: {error.strerror or error}") from error

    def stamp(self) -> str:
        try:
            return str(self.path.stat().st_size)
        except OSError:
            return "missing"

    def location(self) -> str:
        return str(self.path.absolute())

    def changed_since(self, time: float, digest: bytes) -> bool:
        try:
            if self.path.stat().st_mtime <= time:
                return False
            return digest_of(self.path.read_bytes()) != digest
        except OSError:
            return True


def media_files(folder: Path, kind: Kind) -> list[Path]:
    """The files of one kind in a folder and its subfolders, hidden ones left out, in the order of their names."""
    found = [
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES[kind]
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def open_media(folder: Path, kind: Kind, labels: Path | None = None, id_column: str | None = None) -> RawItems:
    """The images or sounds of a folder.

    Labels come from `labels`, from `labels.csv` in the folder, or from the names of the subfolders; where all files lie in
    subfolders called train, val, test (or the usual other words), these give the split.

    Args:
        folder: with files in it or in subfolders.
        kind: image or audio.
        labels: CSV file with a column that names each file by its path in the folder, its name, or either without extension.
        id_column: that column; default `id`, `file`, ...

    Raises:
        InputError: where there is no such file, or rows and files do not fit each other.
    """
    files = media_files(folder, kind)
    if not files:
        raise InputError(f"{folder}: holds no {', '.join(SUFFIXES[kind])} file")
    names = [file.relative_to(folder).as_posix() for file in files]
    suffixes = ", ".join(sorted({f.suffix.lower() for f in files}))
    csv = labels or (folder / LABELS if (folder / LABELS).is_file() else None)
    if csv is None:
        columns: dict[str, Column] = _from_folders(names)
        items = [FileItem(name, path, kind) for name, path in zip(names, files, strict=True)]
        return RawItems(kind, f"folder of {suffixes} files", items, columns)
    problems = Problems(str(folder))
    table = read_csv(csv)
    id_name = find(table, id_column, ID_NAMES, "id_column")
    if id_name is None:
        raise InputError(
            f"id_column: {csv} has no column called {', '.join(ID_NAMES)}; its columns are {', '.join(table)}; "
            f"name the one that holds the file of each item"
        )
    check_ids(table[id_name], problems)
    of_row = matched(table[id_name], files, folder, csv.name, problems)
    problems.raise_any()
    rows = [FileItem(name, path, kind) for name, path in zip(table[id_name], of_row, strict=True) if path is not None]
    return RawItems(kind, f"folder of {suffixes} files", rows, table, used=frozenset({id_name}))


def _from_folders(names: list[str]) -> dict[str, Column]:
    parts = [name.split("/")[:-1] for name in names]
    columns: dict[str, Column] = {}
    if all(p and p[0].lower() in WORDS and not p[0].isdigit() for p in parts):
        columns["split"] = [p[0] for p in parts]
        parts = [p[1:] for p in parts]
    if all(parts):
        columns["label"] = [p[0] for p in parts]
    return columns
