"""Labelled token features out of arrays that are in memory already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.core.arrays import as_tensor
from cenote.features.arrays import common_dtype
from cenote.features.dataset import Task, TokenDataset
from cenote.features.labelling import FRACTIONS, Labelling
from cenote.features.reading import assembled, layered
from cenote.features.source import Filled, Source
from cenote.features.table import GROUP_NAME, SPLIT_NAME, Column
from cenote.features.validate import Problems

ID, LABEL = "id", "label"


class Dataset(TokenDataset):
    """A `TokenDataset` that is made of what is in memory.

    Attributes:
        name: and all others as of `cenote.features.TokenDataset`.
    """

    @staticmethod
    def from_arrays(
        x: Any,
        y: Any,
        *,
        groups: Sequence[Any] | None = None,
        mask: Any = None,
        ids: Sequence[Any] | None = None,
        split: Sequence[Literal["train", "val", "test"]] | None = None,
        task: Task | None = None,
        prefix_tokens: int = 0,
        grid: tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
        fractions: Sequence[float] = FRACTIONS,
        seed: int = 0,
        name: str = "arrays",
    ) -> TokenDataset:
        """Labelled token features, checked as `cenote.features.read` checks those of files.

        Args:
            x: `[items, tokens, dim]`, several layers as `[items, layers, tokens, dim]`, an array or a tensor; or `Bags`; or a
                list of `[tokens, dim]` arrays. Float64 becomes float32.
            y: one label per item, of any kind, or `[items, labels]`: numbers of 0 and 1, or targets to regress.
            groups: per item the patient, speaker, ... that must not stand on two sides of a split.
            mask: `[items, tokens]`, True (or 1) on real tokens.
            ids: a name per item; default 0, 1, ...
            split: per item `"train"`, `"val"` or `"test"`; default: made, as `fractions` and `seed` say.
            task: default by the rules of `cenote.features.targets`.
            prefix_tokens: leading tokens that are [CLS] and registers.
            grid: `(height, width)` of the patch tokens.
            layers: rising numbers of the layers; default 1, 2, ...
            fractions: shares of train, val, test.
            seed: of the split that is made.
            name: for people.

        Raises:
            InputError: that lists everything that is wrong.

        Example:
            >>> import numpy as np
            >>> x = np.random.default_rng(0).normal(size=(60, 5, 8))
            >>> data = Dataset.from_arrays(x, ["spam" if i % 2 else "ham" for i in range(60)])
            >>> data.classes, data.x.shape
            (('ham', 'spam'), torch.Size([60, 5, 8]))
        """
        values, lengths, held = _tokens(x, mask, layers)
        items = len(lengths)
        names = [str(i) for i in (range(items) if ids is None else ids)]
        columns: dict[str, Column] = {
            **_targets(y),
            **({} if groups is None else {GROUP_NAME: _column(groups=groups)}),
            **({} if split is None else {SPLIT_NAME: _column(split=split)}),
        }
        for column, cells in (("ids", names), *columns.items()):
            if len(cells) != items:
                said = {GROUP_NAME: "groups"}.get(column, "y" if column.startswith(LABEL) else column)
                raise InputError(f"{said}: expected one for each of the {items} items of x, got {len(cells)}")
        if prefix_tokens < 0:
            raise InputError(f"prefix_tokens: expected 0 or more leading tokens, got {prefix_tokens}")
        problems = Problems(name)
        bad = [i for i, rows in enumerate(values.split(lengths)) if not bool(rows.isfinite().all())]
        for item in bad:
            problems.add(
                "not finite", f"item {names[item]!r} holds NaN or infinite numbers; leave it out or compute it again"
            )
        source = Source("arrays", names, columns, lambda _: Filled(values, lengths), layers=held)
        labels = [column for column in columns if column.startswith(LABEL)]
        data = assembled(
            name,
            source,
            Labelling(task, labels, None, None, fractions, seed),
            problems,
            prefix_tokens=prefix_tokens,
            grid=grid,
            source_words=f"{name} (in memory)",
        )
        return data if not held else layered(data, held)


def _tokens(x: Any, mask: Any, layers: Sequence[int] | None) -> tuple[Tensor, list[int], tuple[int, ...]]:
    """The real tokens of all items, how many each has, and the numbers of their layers, which stand side by side."""
    if isinstance(x, Bags) or (not isinstance(x, Tensor) and isinstance(x, Sequence | Iterator)):
        bags = x if isinstance(x, Bags) else Bags.from_list(list(x))
        if mask is not None:
            raise InputError("mask: items of different lengths have no padding; leave it out")
        if layers is not None:
            raise InputError("layers: x holds one layer; leave it out")
        return _kept(bags.values), bags.lengths().tolist(), ()
    tensor = as_tensor(x=x)
    if tensor.dim() not in (3, 4):
        raise InputError(
            f"x: expected [items, tokens, dim], [items, layers, tokens, dim], Bags or a list of [tokens, dim], got "
            f"{list(tensor.shape)}"
        )
    held: tuple[int, ...] = ()
    if tensor.dim() == 4:
        held = tuple(range(1, tensor.shape[1] + 1)) if layers is None else tuple(layers)
        if len(held) != tensor.shape[1] or sorted(set(held)) != list(held) or min(held, default=0) < 0:
            raise InputError(f"layers: expected {tensor.shape[1]} rising numbers, got {held}")
        tensor = tensor.transpose(1, 2).flatten(2)
    elif layers is not None:
        raise InputError("layers: x holds one layer; leave it out")
    if mask is None:
        return _kept(tensor.flatten(0, 1)), [tensor.shape[1]] * len(tensor), held
    real = as_tensor(mask=mask)
    if real.shape != tensor.shape[:2]:
        raise InputError(f"mask: expected {list(tensor.shape[:2])} to match x, got {list(real.shape)}")
    if real.dtype != torch.bool and not bool(((real == 0) | (real == 1)).all()):
        raise InputError("mask: holds other numbers than 0 and 1; True (or 1) marks a real token")
    return _kept(tensor[real.bool()]), real.bool().sum(1).tolist(), held


def _kept(values: Tensor) -> Tensor:
    return values.detach().cpu().to(common_dtype({values.dtype if values.is_floating_point() else torch.float64}))


def _targets(y: Any) -> dict[str, Column]:
    """The label columns."""
    if isinstance(y, Tensor):
        y = y.detach().cpu().numpy()
    rows = _column(y=y)
    wide = {len(row) if isinstance(row, list) else 0 for row in rows}
    if rows and wide == {max(wide)} and max(wide):
        return {f"{LABEL} {i}": [row[i] for row in rows] for i in range(max(wide))}
    return {LABEL: rows}


def _column(**given: Any) -> list[Any]:
    """The cells of what is given by name: plain values, of an array, a tensor, a column of a table or a list."""
    ((name, values),) = given.items()
    if isinstance(values, str | bytes):
        raise InputError(f"{name}: expected one for each item, got the one text {values!r}")
    if not hasattr(values, "tolist") and not isinstance(values, Iterable):
        raise InputError(f"{name}: expected one for each item, got {values!r}")
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(plain, list):
        raise InputError(f"{name}: expected one for each item, got {plain!r}")
    return [cell.tolist() if hasattr(cell, "tolist") else cell for cell in plain]
