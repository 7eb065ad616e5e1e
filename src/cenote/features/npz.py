"""One `.npz` with `x [items, tokens, dim]`, of one layer or of several, `y`, and what else is known per item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.core import InputError
from cenote.features import arrays
from cenote.features.arrays import Unusable
from cenote.features.source import Filled, LazyColumns, Source
from cenote.features.table import Column, find
from cenote.features.token_labels import TOKEN_LABELS
from cenote.features.validate import Problems

MASK, OFFSETS, LAYERS = "mask", "offsets", "layers"


def open_npz(path: Path, array: str | None, id_column: str | None, problems: Problems) -> Source:
    """The items of one `.npz`.

    Arrays: `x`; `y` (`[items]`, or `[items, labels]`); optional `mask [items, tokens]` with True on real tokens, `ids`,
    `groups`, `split`, and `token_labels`, a whole number per token. Instead of padding, `x [total, dim]` may come with
    `offsets [items + 1]`. Of several layers, `x` is `[items, layers, tokens, dim]`, and `layers` holds their rising numbers
    (0: the embeddings); default 1, 2, ...

    Args:
        path: the file.
        array: name of the features, if not `x`.
        id_column: name of the ids, if not `ids`.
        problems: takes what is wrong.

    Raises:
        InputError: where there is no usable `x`.
    """
    try:
        members = arrays.npz_members(path)
        name = find(members, array, ("x", "features", "tokens"), "vector_column")
        if name is None:
            raise InputError(
                f"{path}: holds no array called x; it holds {', '.join(members) or 'none'}; "
                f"name the features with vector_column"
            )
        x = arrays.npz_array(path, name)
        offsets = None
        if OFFSETS in members:
            offsets = _offsets(arrays.npz_values(path, OFFSETS), x.shape, path)
        elif len(x.shape) not in (3, 4):
            raise InputError(
                f"{path}: {name} has shape {list(x.shape)}; expected [items, tokens, dim], [items, layers, tokens, dim], "
                f"or [total, dim] together with offsets [items + 1]"
            )
        layers: tuple[int, ...] = ()
        if len(x.shape) == 4:
            given = arrays.npz_values(path, LAYERS) if LAYERS in members else None
            layers = _layers(given, x.shape, path)
            x = _side_by_side(x)
        mask = None
        if MASK in members and offsets is None:
            mask = _mask(arrays.npz_values(path, MASK), x.shape, path)
        labels = None
        if TOKEN_LABELS in members:
            labels = _token_labels(
                arrays.npz_values(path, TOKEN_LABELS), x.shape[: 1 if offsets is not None else 2], path
            )
    except Unusable as error:
        raise InputError(f"{path}: {error}") from error
    items = x.shape[0] if offsets is None else len(offsets) - 1

    def column(key: str) -> Column:
        try:
            values = arrays.npz_values(path, key)
        except Unusable as error:
            raise InputError(f"{path}: {error}; save {key} as numbers or texts, not as objects") from error
        return values.tolist()

    shapes = {
        key: shape
        for key, (shape, _) in members.items()
        if key not in (name, MASK, OFFSETS, TOKEN_LABELS, *([LAYERS] if layers else []))
    }
    names = [key for key, shape in shapes.items() if len(shape) == 1 and shape[0] == items]
    id_name = find(shapes, id_column, ("ids", "id"), "id_column")
    ids = [str(i) for i in (range(items) if id_name is None else column(id_name))]
    for key, shape in shapes.items():
        if shape[:1] != (items,):
            problems.add(
                "shape", f"array {key!r} has shape {list(shape)}, but there are {items} items; save one entry per item"
            )
    if len(ids) != items:
        ids = [str(i) for i in range(items)]
    renamed = {"groups": "group", "splits": "split"}
    columns = {renamed.get(key, key): key for key in names}
    targets = {f"{key} {i}": (key, i) for key, shape in shapes.items() if len(shape) == 2 for i in range(shape[1])}

    def read(key: str) -> Column:
        if key in targets:
            wide, i = targets[key]
            return [row[i] for row in column(wide)]
        return column(columns[key])

    def load(found: Problems) -> Filled | None:
        lengths = _lengths(x.shape, mask, offsets)
        values = torch.empty(sum(lengths), x.shape[-1], dtype=arrays.common_dtype({x.dtype}))
        try:
            _fill(values, x, mask, lengths, ids, found)
        except (Unusable, OSError) as error:
            found.add("unreadable", f"array {name!r} {error}")
        kept = labels if labels is None or mask is None else labels[mask]
        return Filled(
            values, lengths, token_labels=None if kept is None else torch.from_numpy(kept.astype(np.int64)).flatten()
        )

    return Source(
        ".npz",
        ids,
        LazyColumns([*columns, *targets], read),
        load,
        used=frozenset() if id_name is None else frozenset({id_name}),
        layers=layers,
    )


def _layers(given: NDArray[Any] | None, shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    if given is None:
        return tuple(range(1, shape[1] + 1))
    numbers = given.tolist() if given.dtype.kind in "iu" and given.ndim == 1 else []
    if len(numbers) != shape[1] or sorted(set(numbers)) != numbers or min(numbers, default=0) < 0:
        raise InputError(
            f"{path}: layers must hold the {shape[1]} rising numbers of the layers of x, which has shape {list(shape)}"
        )
    return tuple(numbers)


def _token_labels(given: NDArray[Any], shape: tuple[int, ...], path: Path) -> NDArray[Any]:
    if given.dtype.kind not in "iub" or given.shape != shape:
        raise InputError(
            f"{path}: token_labels must hold a whole number per token, of shape {list(shape)} to go with x; "
            f"got {given.dtype} of shape {list(given.shape)}"
        )
    return given


def _side_by_side(x: arrays.StoredArray) -> arrays.StoredArray:
    """`[items, layers, tokens, dim]` read as `[items, tokens, layers * dim]`."""
    items, layers, tokens, dim = x.shape
    return arrays.StoredArray(
        (items, tokens, layers * dim), x.dtype, lambda: (block.transpose(1, 2).flatten(2) for block in x.blocks())
    )


def _lengths(shape: tuple[int, ...], mask: NDArray[np.bool_] | None, offsets: NDArray[np.int64] | None) -> list[int]:
    if offsets is not None:
        return np.diff(offsets).tolist()
    return [shape[1]] * shape[0] if mask is None else mask.sum(1).tolist()


def _fill(
    values: torch.Tensor,
    x: arrays.StoredArray,
    mask: NDArray[np.bool_] | None,
    lengths: list[int],
    ids: list[str],
    problems: Problems,
) -> None:
    """Copy the real tokens, and name the items that hold numbers that are not finite."""
    start = row = 0
    for block in x.blocks():
        real = block.flatten(0, -2) if mask is None else block[torch.from_numpy(mask[row : row + len(block)])]
        values[start : start + len(real)] = real
        start += len(real)
        row += len(block)
    ends = np.cumsum(lengths)
    rows = arrays.rows_per_block(tuple(values.shape), values.element_size())
    bad: set[int] = set()
    for i in range(0, len(values), rows):
        odd = (~values[i : i + rows].isfinite().all(1)).nonzero().flatten().numpy() + i
        bad.update(np.searchsorted(ends, odd, side="right").tolist())
    for item in sorted(bad):
        problems.add(
            "not finite", f"item {ids[item]!r} holds NaN or infinite numbers; leave it out or compute it again"
        )


def _mask(values: NDArray[Any], shape: tuple[int, ...], path: Path) -> NDArray[np.bool_]:
    if values.shape != shape[:2]:
        raise InputError(f"{path}: mask has shape {list(values.shape)}; expected {list(shape[:2])} to match x")
    if values.dtype != np.bool_ and not np.isin(values, (0, 1)).all():
        raise InputError(f"{path}: mask holds other numbers than 0 and 1; True (or 1) marks a real token")
    return values.astype(np.bool_)


def _offsets(values: NDArray[Any], shape: tuple[int, ...], path: Path) -> NDArray[np.int64]:
    fits = values.ndim == 1 and values.dtype.kind in "iu" and len(values) > 1 and len(shape) == 2
    if not fits or values[0] != 0 or values[-1] != shape[0] or (np.diff(values.astype(np.int64)) < 0).any():
        raise InputError(
            f"{path}: offsets must be items + 1 whole numbers that rise from 0 to the number of rows of x, which has shape "
            f"{list(shape)}"
        )
    return values.astype(np.int64)
