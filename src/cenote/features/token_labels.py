"""`token_labels`: a whole number per token, which instances of a bag matter. One name, wherever the tokens come from.

Of a folder of files, in the item's own file beside its features, or in a folder `token_labels/` with a file of the same name;
of tables, in a column of lists; of an `.npz` with all items, in an array of the shape of `x` without its width. Prefix tokens
are counted. An item without them has no token that matters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cenote.features import arrays
from cenote.features.arrays import Unusable
from cenote.features.validate import Problems

TOKEN_LABELS = "token_labels"
_KIND = "token labels"


class TokenLabels:
    """Labels of tokens, collected item by item.

    Args:
        ids: names of the items.
        lengths: how many tokens each has.
        problems: takes labels that don't fit.
        known: of all tokens, where they have been read already.
    """

    def __init__(
        self, ids: Sequence[str], lengths: Sequence[int], problems: Problems, known: Int[Tensor, "total"] | None = None
    ) -> None:
        self._ids = ids
        self._lengths = lengths
        self._problems = problems
        self._of: dict[int, NDArray[np.int64]] = {}
        if known is not None:
            self._of = dict(enumerate(np.split(known.numpy(), np.cumsum(lengths)[:-1])))

    def add(self, item: int, given: object, where: str) -> None:
        """Labels of one item; `where` they stand, for messages."""
        said, count = f"item {self._ids[item]!r} ({where})", self._lengths[item]
        try:
            labels = np.asarray(given)
        except ValueError:  # lists of different lengths inside
            labels = np.empty(count, dtype=object)
        if labels.size and (labels.dtype.kind not in "iub" or labels.ndim != 1):
            self._problems.add(
                _KIND,
                f"{said}: {TOKEN_LABELS} holds {labels.dtype} of shape {list(labels.shape)}; expected a whole number per "
                f"token, of shape [{count}]",
            )
        elif len(labels) != count:
            self._problems.add(
                _KIND,
                f"{said}: {TOKEN_LABELS} has {len(labels)} entries, but the item has {count} tokens; give one per token, "
                f"prefix tokens included",
            )
        elif item in self._of:
            self._problems.add(_KIND, f"{said}: {TOKEN_LABELS} are given a second time; keep one of them")
        else:
            self._of[item] = labels.astype(np.int64)

    def flat(self) -> Int[Tensor, "total"] | None:
        """Of all tokens, 0 in items without labels; `None` where no item has any."""
        if not self._of:
            return None
        every = [self._of.get(i, np.zeros(n, np.int64)) for i, n in enumerate(self._lengths)]
        return torch.from_numpy(np.concatenate(every))


def add_own(labels: TokenLabels, item: int, file: Path, where: str) -> None:
    """The array `token_labels` in an item's own file, if there is one.

    Raises:
        Unusable: where the file cannot be read.
    """
    found = arrays.whole_arrays(file)
    if TOKEN_LABELS in found:
        labels.add(item, found[TOKEN_LABELS](), where)


def add_folder(labels: TokenLabels, names: Iterable[Sequence[str]], folder: Path, problems: Problems) -> None:
    """The files of the folder `token_labels/`, if there is one.

    Args:
        labels: takes them.
        names: per item, what its file may be called, with or without an extension of its own.
        folder: of the data.
        problems: takes files that cannot be read or belong to no item.
    """
    root = folder / TOKEN_LABELS
    if not root.is_dir():
        return
    items_of: dict[str, set[int]] = {}
    for item, called in enumerate(names):
        for name in called:
            items_of.setdefault(name, set()).add(item)
    for file in sorted(f for f in root.rglob("*") if f.is_file() and not f.name.startswith(".")):
        relative = file.relative_to(root)
        where = (Path(TOKEN_LABELS) / relative).as_posix()
        found = items_of.get(relative.as_posix()) or items_of.get(relative.with_suffix("").as_posix()) or set()
        if len(found) != 1:
            many = "several items; add the extension of one to it" if found else "no item; rename it or take it out"
            problems.add(_KIND, f"file {where!r} has the name of {many}")
        elif file.suffix.lower() not in arrays.SUFFIXES:
            problems.add(_KIND, f"file {where!r} is none of {', '.join(arrays.SUFFIXES)}; save it as .npy")
        else:
            try:
                labels.add(next(iter(found)), _only(file), where)
            except Unusable as error:
                problems.add("unreadable", f"file {where!r} {error}")


def add_column(labels: TokenLabels, cells: Iterable[object]) -> None:
    """The column `token_labels` of a table: a list per item, or a text such as `0;1;0`, or nothing."""
    for item, cell in enumerate(cells):
        if isinstance(cell, str) and cell.strip():
            parts = re.split(r"[;,\s]+", cell.strip())
            numbers = [int(part) if re.fullmatch(r"-?[0-9]+", part) else part for part in parts]
            labels.add(item, numbers, f"column {TOKEN_LABELS}")
        elif cell is not None and not isinstance(cell, str):
            labels.add(item, cell, f"column {TOKEN_LABELS}")


def _only(file: Path) -> NDArray[np.generic]:
    found = arrays.whole_arrays(file)
    if not found:
        raise Unusable("holds no array")
    if len(found) > 1 and TOKEN_LABELS not in found:
        raise Unusable(f"holds several arrays, {', '.join(found)}; keep one, or call it {TOKEN_LABELS}")
    return found.get(TOKEN_LABELS, next(iter(found.values())))()
