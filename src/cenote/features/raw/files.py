"""Folders with one image or one sound per file; labels from subfolders or a CSV file."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cenote.core import InputError
from cenote.core.files import read_regular
from cenote.core.memory import MAX_ITEM_SIZE
from cenote.features.folder import is_output, matched
from cenote.features.raw.decode import check_image, decode_audio, decode_image, require_affordable
from cenote.features.raw.items import Item, Kind, RawItems, Read, UnreadableError, digest_of
from cenote.features.splits import WORDS
from cenote.features.table import ID_NAMES, Column, find, read_csv
from cenote.features.validate import Problems, check_ids, some

LABELS = "labels.csv"
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"),
}
DECODE: dict[Kind, Callable[[bytes, int], Any]] = {"image": decode_image, "audio": decode_audio}
CHECK: dict[Kind, Callable[[bytes, int], Any]] = {"image": check_image, "audio": decode_audio}


@dataclass(frozen=True)
class FileItem(Item):
    """An image or a sound in a file of its own, which may take so many bytes."""

    id: str
    path: Path
    kind: Kind
    most: int = MAX_ITEM_SIZE

    def read(self) -> Read:
        data = self._bytes()
        return Read(DECODE[self.kind](data, self.most), digest_of(data))

    def check(self) -> None:
        CHECK[self.kind](self._bytes(), self.most)

    def limited(self, most: int) -> Item:
        return replace(self, most=most)

    def _bytes(self) -> bytes:
        try:
            require_affordable(self.path.stat().st_size, self.most, "is a large file")
            return read_regular(self.path)
        except OSError as error:
            raise UnreadableError(f"cannot be read: {error.strerror or error}") from error

    def stamp(self) -> str:
        try:
            return str(self.path.stat().st_size)
        except OSError:
            return "missing"

    def location(self) -> str:
        return str(self.path.absolute())

    def changed(self, digest: bytes) -> bool:
        try:
            return digest_of(self._bytes()) != digest
        except UnreadableError:
            return True


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, hidden ones and outputs left out, in the order of their names.

    Links to folders are followed, but for those that lead back to a folder that they lie in.

    Raises:
        InputError: where a subfolder cannot be read.
    """
    return sorted(_walk(folder, ()), key=lambda file: file.relative_to(folder).as_posix())


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"data: cannot read the folder {folder} ({error.strerror}); allow it, or take it out"
        ) from error
    for entry in found:
        mode = _mode(entry)
        if mode == stat.S_IFDIR:
            if not is_output(Path(entry.path)):
                yield from _walk(Path(entry.path), (*above, real))
        # a link that leads nowhere is an item that cannot be read, and told as such
        elif mode in (stat.S_IFREG, None):
            yield Path(entry.path)


def _mode(entry: os.DirEntry[str]) -> int | None:
    try:
        if entry.is_symlink():
            return stat.S_IFMT(entry.stat().st_mode)
        return stat.S_IFDIR if entry.is_dir() else stat.S_IFREG if entry.is_file() else 0
    except OSError:
        return None


def media_files(files: list[Path], kind: Kind) -> list[Path]:
    """Those of one kind."""
    return [file for file in files if file.suffix.lower() in SUFFIXES[kind]]


def kinds_of_files(files: list[Path]) -> str:
    """How many there are of which suffix.

    >>> kinds_of_files([Path("a.heic"), Path("b.HEIC"), Path("README")])
    '2 .heic, 1 without suffix'
    """
    counts = Counter(file.suffix.lower() or "without suffix" for file in files)
    return some(f"{count} {name}" for name, count in counts.most_common())


def open_media(
    folder: Path, below: list[Path], kind: Kind, labels: Path | None = None, id_column: str | None = None
) -> RawItems:
    """The images or sounds of a folder.

    Labels come from `labels`, from `labels.csv` in the folder, or from the names of the subfolders; where all files lie in
    subfolders called train, val, test (or the usual other words), these give the split.

    Args:
        folder: with files in it or in subfolders.
        below: all of these files.
        kind: image or audio.
        labels: CSV file with a column that names each file by its path in the folder, its name, or either without extension.
        id_column: that column; default `id`, `file`, ...

    Raises:
        InputError: where there is no such file, or rows and files do not fit each other.
    """
    files = media_files(below, kind)
    if not files:
        raise InputError(f"{folder}: holds no {', '.join(SUFFIXES[kind])} file")
    names = [file.relative_to(folder).as_posix() for file in files]
    csv = labels or (folder / LABELS if (folder / LABELS).is_file() else None)
    suffixes = ", ".join(sorted({f.suffix.lower() for f in files}))
    others = [f for f in below if f.suffix.lower() not in SUFFIXES[kind] and f != csv]
    aside = f"; not read: {kinds_of_files(others)}" if others else ""
    in_words = f"folder of {suffixes} files{aside}"
    problems = Problems(str(folder))
    _check_names(names, problems)
    problems.raise_any()
    if csv is None:
        if id_column is not None:
            raise InputError(f"id_column: {folder} has no {LABELS}, and none was named; leave the column out")
        columns: dict[str, Column] = _from_folders(folder, names)
        beside = [name for name in names if "/" not in name]
        if 0 < len(beside) < len(names):
            in_words += f"; no labels, as {some(beside)} lie beside the subfolders"
        items = [FileItem(name, path, kind) for name, path in zip(names, files, strict=True)]
        return RawItems(kind, in_words, items, columns)
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
    return RawItems(kind, in_words, rows, table, used=frozenset({id_name}))


def _check_names(names: list[str], problems: Problems) -> None:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            problems.add("name", f"the name of the file {shown} is no UTF-8 text; rename it")


def _from_folders(folder: Path, names: list[str]) -> dict[str, Column]:
    parts = [name.split("/")[:-1] for name in names]
    columns: dict[str, Column] = {}
    first = dict.fromkeys(p[0] for p in parts if len(p) > 1)
    splits = [name for name in first if name.lower() in WORDS and not name.isdigit()]
    others = [name for name in first if name not in splits]
    if len({WORDS[name.lower()] for name in splits}) > 1 and others:
        raise InputError(
            f"data: {folder} holds {some(splits)}, which are splits, and {some(others)}, which {'are' if others[1:] else 'is'} "
            f"none; take one or the other elsewhere, or name the labels of all files in a CSV file"
        )
    if all(p and p[0].lower() in WORDS and not p[0].isdigit() for p in parts):
        columns["split"] = [p[0] for p in parts]
        parts = [p[1:] for p in parts]
    if all(parts):
        columns["label"] = [p[0] for p in parts]
    return columns
