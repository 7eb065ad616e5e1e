"""A folder with one file of tokens per item and `labels.csv`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.files import LOCK
from cenote.features import arrays
from cenote.features.arrays import StoredArray, Unusable
from cenote.features.source import Filled, Source
from cenote.features.table import ID_NAMES, find, read_csv
from cenote.features.token_labels import TOKEN_LABELS, TokenLabels, add_folder, add_own
from cenote.features.validate import Problems, check_ids, some

LABELS = "labels.csv"


def open_folder(
    folder: Path,
    labels: Path | None,
    array: str | None,
    id_column: str | None,
    labelled: bool,
    problems: Problems,
) -> Source:
    """The items of a folder, matched with their rows of labels.

    Args:
        folder: holds a `[tokens, dim]` array per item, in subfolders or not.
        labels: CSV file; default `labels.csv` in the folder.
        array: which array, where the files hold several.
        id_column: the column with the path of an item's file inside the folder, with or without its extension, or, where
            that is unique, the bare file name.
        labelled: False: every file is an item, and labels are not looked for.
        problems: takes ids without file and files without row.
    """
    files = token_files(folder)
    if not files:
        raise InputError(
            f"{folder}: holds no {', '.join(arrays.SUFFIXES)} file; give a folder with one such file per item, "
            f"or, to begin with raw images, sounds or texts, a model with --backbone"
        )
    kinds = ", ".join(sorted({f.suffix for f in files}))
    if not labelled:
        names = [f.relative_to(folder).with_suffix("").as_posix() for f in files]
        if len(set(names)) < len(names):
            names = [f.relative_to(folder).as_posix() for f in files]
        paths: list[Path | None] = list(files)
        return Source(f"folder of {kinds} files", names, {}, lambda found: _load(names, paths, folder, array, found))

    csv = labels or folder / LABELS
    if labels is None and not csv.is_file():
        others = sorted(f.name for f in folder.glob("*.[ct]sv"))
        raise InputError(
            f"{folder}: there is no {LABELS}; "
            + (
                f"name the file with labels=... (there is {some(others)})"
                if others
                else "add one with columns id and label"
            )
        )
    columns = read_csv(csv)
    id_name = find(columns, id_column, ID_NAMES, "id_column")
    if id_name is None:
        raise InputError(
            f"id_column: {csv} has no column called {', '.join(ID_NAMES)}; its columns are {', '.join(columns)}; "
            f"name the one that holds the file of each item"
        )
    ids = columns[id_name]
    check_ids(ids, problems)
    of_item = matched(ids, files, folder, csv.name, problems)
    return Source(
        f"folder of {kinds} files",
        ids,
        columns,
        lambda found: _load(ids, of_item, folder, array, found),
        used=frozenset({id_name}),
    )


def token_files(folder: Path) -> list[Path]:
    """The files that may hold tokens, in subfolders or not, but for those that hold labels of tokens and those of outputs."""
    output = {folder: False}

    def in_output(below: Path) -> bool:
        if below not in output:
            output[below] = in_output(below.parent) or is_output(below)
        return output[below]

    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in arrays.SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.relative_to(folder).parts[0] != TOKEN_LABELS
        and not in_output(file.parent)
    ]


def is_output(folder: Path) -> bool:
    """Whether cenote wrote a folder of results or a store there: who works in the folder of the data has it among them."""
    store = (folder / "manifest.json").is_file() and (folder / "shards").is_dir()
    return store or (folder / LOCK).is_file() or (folder / "comparison.json").is_file()


def matched(ids: list[str], files: list[Path], folder: Path, labels: str, problems: Problems) -> list[Path | None]:
    """The file of each id: by its path in the folder, its path without extension, its name, its name without extension."""
    ways: tuple[dict[str, list[Path]], ...] = ({}, {}, {}, {})
    for file in files:
        relative = file.relative_to(folder)
        keys = (relative.as_posix(), relative.with_suffix("").as_posix(), file.name, file.stem)
        for way, key in zip(ways, keys, strict=True):
            way.setdefault(key, []).append(file)
    matched: list[Path | None] = []
    for name in ids:
        key = name.replace("\\", "/").removeprefix("./")
        candidates = next((way[key] for way in ways if key in way), [])
        matched.append(candidates[0] if len(candidates) == 1 else None)
        if len(candidates) > 1:
            relatives = some(f.relative_to(folder).as_posix() for f in candidates)
            problems.add("several files", f"id {name!r} may be any of {relatives}; write its path in {labels}")
        elif name and not candidates:
            problems.add("no file", f"id {name!r} in {labels} has no file in the folder; add it or take the row out")
    owners: dict[Path, set[str]] = {}
    for name, found in zip(ids, matched, strict=True):
        if found is not None:
            owners.setdefault(found, set()).add(name)
    for file in files:
        name = file.relative_to(folder).as_posix()
        if file not in owners:
            problems.add("no row", f"file {name!r} has no row in {labels}; add one or move the file elsewhere")
        elif len(owners[file]) > 1:
            who = some(map(repr, sorted(owners[file])))
            problems.add("duplicate id", f"ids {who} mean one file, {name}; keep one row per item")
    return matched


def _load(
    ids: list[str], files: list[Path | None], folder: Path, array: str | None, problems: Problems
) -> Filled | None:
    """Headers first, then one tensor for everything, filled file by file."""
    stored: list[StoredArray | None] = []
    for name, file in zip(ids, files, strict=True):
        stored.append(None if file is None else _open(name, file, folder, array, problems))
    widths = Counter(s.shape[1] for s in stored if s is not None and s.shape[0])
    if not widths:
        for name, s in zip(ids, stored, strict=True):
            if s is not None:
                problems.add("empty", f"item {name!r} has no tokens; leave it out")
        return None
    dim = widths.most_common(1)[0][0]
    for i, s in enumerate(stored):
        if s is not None and s.shape[0] and s.shape[1] != dim:
            problems.add(
                "width",
                f"item {ids[i]!r} has vectors of width {s.shape[1]}, but {widths[dim]} of {widths.total()} items have {dim}; "
                f"use one model for all, or take it out",
            )
            stored[i] = None
    lengths = [0 if s is None else s.shape[0] for s in stored]
    dtype = arrays.common_dtype({s.dtype for s in stored if s is not None})
    values = torch.empty(sum(lengths), dim, dtype=dtype)
    start = 0
    for name, file, s in zip(ids, files, stored, strict=True):
        if s is None or file is None:
            continue
        part = values[start : start + s.shape[0]]
        start += s.shape[0]
        where = f"item {name!r} ({file.relative_to(folder).as_posix()})"
        if s.shape[0] == 0:
            problems.add("empty", f"{where} has no tokens; leave it out")
            continue
        try:
            arrays.fill(part, s)
        except Unusable as error:
            problems.add("unreadable", f"{where} {error}")
    # what the labels of a file that was told of above must fit is not known
    labels = None if None in stored else _token_labels(ids, files, lengths, folder, problems)
    return Filled(values, lengths, token_labels=labels)


def _token_labels(
    ids: list[str], files: list[Path | None], lengths: list[int], folder: Path, problems: Problems
) -> Int[Tensor, "total"] | None:
    labels = TokenLabels(ids, lengths, problems)
    relatives = [file.relative_to(folder) for file in files if file is not None]
    for item, relative in enumerate(relatives):
        try:
            add_own(labels, item, folder / relative, relative.as_posix())
        except Unusable as error:
            problems.add("unreadable", f"item {ids[item]!r} ({relative.as_posix()}) {error}")
    add_folder(labels, [(r.as_posix(), r.with_suffix("").as_posix()) for r in relatives], folder, problems)
    return labels.flat()


def _open(name: str, file: Path, folder: Path, array: str | None, problems: Problems) -> StoredArray | None:
    where = f"item {name!r} ({file.relative_to(folder).as_posix()})"
    try:
        found = arrays.open_array(file, array)
    except Unusable as error:
        problems.add("unreadable", f"{where} {error}")
        return None
    if len(found.shape) != 2:
        hint = "array[None]" if len(found.shape) == 1 else "array.reshape(-1, dim)"
        problems.add(
            "shape", f"{where} has shape {list(found.shape)}; expected [tokens, dim], one row per token: save {hint}"
        )
        return None
    return found
