"""Columns of labels, whatever file they come from."""

from __future__ import annotations

import csv
import io
import re
import threading
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from cenote.core import InputError

Column = Sequence[Any]
ID_NAMES = ("id", "item", "name", "file", "filename", "path")
LABEL_NAMES = ("label", "labels", "y", "target", "class")
SPLIT_NAME, GROUP_NAME = "split", "group"
LONGEST_CELL = 2**31 - 1

_reading = threading.Lock()


def read_csv(path: Path, names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Columns of a CSV file with a header line; separated by commas, or as the header shows by tabs, semicolons or bars.

    A quoted cell may hold line ends. Where every line of a file separated by tabs has a cell per column, quotes stand for
    themselves, unless they enclose the cell.

    Args:
        path: the file.
        names: of the columns, for a file without a header line.

    Raises:
        InputError: where it is missing, not UTF-8 text, empty, or a line has too many or too few cells.
    """
    if not path.is_file():
        raise InputError(f"labels: there is no file {path}; it must have a header line such as id,label")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"labels: {path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    head = re.sub(r'"[^"\n]*"', "", text).lstrip("\n").split("\n", 1)[0]
    separator = next((s for s in ("\t", ",", ";", "|") if s in head), ",")
    lines = (_plain_lines(text, names) if separator == "\t" else None) or _lines(path, text, separator)
    if names is not None:
        lines = [(0, list(names)), *lines]
    if len(lines) < 2:
        raise InputError(f"{path}: holds no item; expected a header line such as id,label and a line per item")
    names = [name.strip() for name in lines[0][1]]
    if len(set(names)) < len(names):
        raise InputError(f"labels: {path} names a column twice: {', '.join(names)}; give each a name of its own")
    for number, row in lines[1:]:
        if len(row) != len(names):
            hint = "is a quote not closed?" if any("\n" in cell for cell in row) else ""
            raise InputError(
                f"labels: {path}, line {number}: {len(row)} cells under {len(names)} column names; "
                + (hint or f"put cells that hold {separator!r} in quotes")
            )
    return {name: [row[i].strip() for _, row in lines[1:]] for i, name in enumerate(names)}


def _lines(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Lines with something in them, and their numbers; a quoted cell may hold line ends and be long."""
    # the limit is one for all threads, and reading holds the interpreter anyway
    with _reading:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            return _parsed(path, text, separator)
        finally:
            csv.field_size_limit(before)


def _parsed(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    start = 1
    try:
        lines = []
        for row in reader:
            if any(row):
                lines.append((start, row))
            start = reader.line_num + 1
        return lines
    except csv.Error as error:
        loose = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        lines = [(loose.line_num, row) for row in loose if any(row)]
        # characters beside a quote do no harm while every cell ends on its line
        if not any("\n" in cell for _, row in lines for cell in row):
            return lines
        raise InputError(
            f"labels: {path}, line {start}: {error}; a quote in a cell is not closed, or not doubled"
        ) from error


def _plain_lines(text: str, names: Sequence[str] | None) -> list[tuple[int, list[str]]] | None:
    """Lines whose quotes stand for themselves; `None` where they have not all as many cells as there are columns."""
    lines = [(number, line.split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    columns = len(names) if names is not None else len(lines[0][1]) if lines else 0
    if any(len(row) != columns for _, row in lines):
        return None
    return [(number, [_unquoted(cell) for cell in row]) for number, row in lines]


def _unquoted(cell: str) -> str:
    """
    >>> _unquoted('"a ""b"" c"'), _unquoted('"a" and "b"'), _unquoted('"')
    ('a "b" c', '"a" and "b"', '"')
    """
    inside = cell[1:-1].replace('""', "") if len(cell) > 1 and cell[0] == cell[-1] == '"' else '"'
    return cell if '"' in inside else cell[1:-1].replace('""', '"')


def find(columns: Mapping[str, Column], wanted: str | None, usual: Sequence[str], argument: str) -> str | None:
    """The wanted column; where none is named, the first usual one that is there."""
    if wanted is not None:
        return _required(columns, wanted, argument)
    return next((name for name in usual if name in columns), None)


def _required(columns: Mapping[str, Column], name: str, argument: str) -> str:
    if name not in columns:
        raise InputError(f"{argument}: there is no column {name!r}; the columns are {', '.join(columns) or 'none'}")
    return name


def label_columns(columns: Mapping[str, Column], wanted: str | Sequence[str] | None, others: set[str]) -> list[str]:
    """The columns that hold the target.

    Args:
        columns: all.
        wanted: as the caller named them; a text that is no column's name is taken as names separated by commas.
        others: the columns already known to be something else.

    Raises:
        InputError: where they cannot be found, naming the columns that are there.
    """
    if wanted is not None:
        if isinstance(wanted, str) and wanted not in columns:
            wanted = [part.strip() for part in wanted.split(",")]
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        return [c for name in names for c in _wide(columns, name) or [_required(columns, name, "label_column")]]
    for name in LABEL_NAMES:
        found = [name] if name in columns else _wide(columns, name)
        if found:
            return found
    rest = [name for name in columns if name not in others]
    if len(rest) == 1 or (rest and all(number(cell) is not None for name in rest for cell in columns[name])):
        return rest
    if not columns:
        raise InputError("labels: the data hold none; give a CSV file with a line per item, its id and its label")
    raise InputError(
        f"label_column: no column is called {', '.join(LABEL_NAMES)}; the columns are {', '.join(columns)}; "
        f"name the one that holds the label (several: separated by commas)"
    )


def _wide(columns: Mapping[str, Column], name: str) -> list[str]:
    """The columns `y 0`, `y 1`, ... that a two-dimensional `y` is read as."""
    return list(takewhile(columns.__contains__, (f"{name} {i}" for i in count())))


def is_missing(cell: object) -> bool:
    """Whether a cell holds nothing: None, an empty text, NaN."""
    return cell is None or (isinstance(cell, float) and cell != cell) or str(cell).strip().lower() in ("", "nan")


def number(cell: object) -> float | None:
    """The number in a cell, if it is one.

    >>> number(" 2.50"), number(True), number("1_0"), number("a")
    (2.5, 1.0, None, None)
    """
    if isinstance(cell, int | float):
        return float(cell)
    text = str(cell).strip()
    if "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None
