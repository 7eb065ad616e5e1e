"""From label cells to a target: which task it is, which classes there are.

Rules, where the task is not given:

1. Several label columns: all cells 0 or 1, multilabel; all numbers, regression with several targets.
2. One column where any cell is a list or holds `;`: multilabel, the union of the names.
3. One column of numbers of which any is not whole: regression, if it has more than 10 different values.
4. One column of whole numbers with more than 20 different values and fewer than 10 items for each: not decided, must be given.
5. Anything else: binary with two different values, multiclass with more.

Classes are in the order of the numbers, or of the alphabet; in a binary task the second is the positive one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_one_of
from cenote.features.dataset import Task
from cenote.features.labelling import Labelling
from cenote.features.table import Column, is_missing, number
from cenote.features.validate import Problems, some

REGRESSION_ABOVE = 10
WHOLE_NUMBERS_ABOVE, ITEMS_FOR_EACH = 20, 10
SEPARATOR = ";"


@dataclass(frozen=True)
class Target:
    """`y`, `task` and `classes` of a `TokenDataset`."""

    y: Tensor
    task: Task
    classes: tuple[str, ...]


def target(
    ids: Sequence[str],
    columns: Mapping[str, Column],
    labelling: Labelling,
    names: Mapping[str, Sequence[str]],
    problems: Problems,
) -> Target | None:
    """The target in these label columns.

    Args:
        ids: for messages.
        columns: the label columns, a cell per item.
        labelling: its task, or none to decide by the rules above.
        names: class names of columns that store class numbers.
        problems: takes what is wrong; then the result is `None`.

    Raises:
        InputError: where the task is no task, or cannot be decided.
    """
    if labelling.task is not None:
        require_one_of(get_args(Task), task=labelling.task)
    before = len(problems)
    columns = {name: _named(cells, names.get(name)) for name, cells in columns.items()}
    chosen = labelling.task or decided(columns)
    if chosen == "regression":
        made = _regression(ids, columns, problems)
    elif chosen == "multilabel":
        made = _multilabel(ids, columns, problems)
    else:
        made = _classes(ids, columns, chosen, names, problems)
    return made if len(problems) == before else None


def decided(columns: Mapping[str, Column]) -> Task:
    """The task by the rules above."""
    if len(columns) > 1:
        cells = [c for column in columns.values() for c in column if not is_missing(c)]
        numbers = {number(c) for c in cells}
        if numbers <= {0.0, 1.0}:
            return "multilabel"
        if None not in numbers:
            return "regression"
        odd = next(c for c in cells if number(c) is None)
        raise InputError(
            f"label_column: several columns ({some(columns)}) must all hold 0 and 1 (multilabel) or numbers (regression), "
            f"but there is {odd!r}; name one column"
        )
    ((name, column),) = columns.items()
    if any(isinstance(c, list) or (isinstance(c, str) and SEPARATOR in c) for c in column):
        return "multilabel"
    present = [c for c in column if not is_missing(c)]
    distinct = set(map(str, present))
    numbers = {number(c) for c in distinct}
    classes = len(set(_words(present)))
    if None not in numbers and not all(isinstance(c, bool) for c in present):
        whole = all(v is not None and v.is_integer() for v in numbers)
        undecided = len(numbers) > WHOLE_NUMBERS_ABOVE and len(present) < ITEMS_FOR_EACH * len(numbers)
        if not whole and len(numbers) > REGRESSION_ABOVE:
            return "regression"
        if not whole or undecided:
            raise InputError(
                f"task: column {name!r} holds {len(numbers)} different numbers over {len(present)} items "
                f"({some(_ordered(distinct))}), which may be classes or a quantity; give task='multiclass' or task='regression'"
            )
    return "binary" if classes <= 2 else "multiclass"


def check_enough(made: Target, groups: Sequence[str] | None, problems: Problems) -> None:
    """Every class can be in train, val and test: three items, of three groups where there are groups."""
    if made.task == "regression":
        return
    units = "items" if groups is None else "groups"
    owners = np.arange(len(made.y)) if groups is None else np.unique(np.array(groups), return_inverse=True)[1]
    for i, name in enumerate(made.classes):
        holds = (made.y[:, i] > 0 if made.task == "multilabel" else made.y == i).numpy()
        count = len(set(owners[holds].tolist()))
        if count < 3:
            problems.add(
                "class too small",
                f"class {name!r} has {count} {units if count != 1 else units[:-1]}, and each of train, val and test needs one; "
                f"add {units}, leave the class out, or give a split column"
                + (" (task='regression' if it is a quantity)" if number(name) is not None else ""),
            )


def _named(cells: Column, names: Sequence[str] | None) -> Column:
    if not names:
        return cells
    return [_name(c, names) for c in cells]


def _name(cell: Any, names: Sequence[str]) -> Any:
    if isinstance(cell, list):
        return [_name(c, names) for c in cell]
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else cell


def _classes(
    ids: Sequence[str], columns: Mapping[str, Column], task: str, names: Mapping[str, Sequence[str]], problems: Problems
) -> Target | None:
    if len(columns) > 1:
        raise InputError(f"label_column: a {task} task has one label column, got {some(columns)}")
    ((column, cells),) = columns.items()
    _check_present(ids, column, cells, problems)
    words = _words(cells)
    known = {w for w, c in zip(words, cells, strict=True) if not is_missing(c)}
    order = [n for n in names.get(column, ()) if n in known] or _ordered(known)
    classes = tuple(order) + tuple(_ordered(known - set(order)))
    if len(classes) < 2:
        problems.add(
            "one class", f"column {column!r} holds one class only, {some(classes)}; a probe needs at least two"
        )
    elif task == "binary" and len(classes) > 2:
        raise InputError(f"task: binary, but column {column!r} holds {len(classes)} classes ({some(classes)})")
    index = {c: i for i, c in enumerate(classes)}
    y = torch.tensor([index.get(w, 0) for w in words])
    return Target(y, "binary" if task == "binary" else "multiclass", classes)


def _multilabel(ids: Sequence[str], columns: Mapping[str, Column], problems: Problems) -> Target | None:
    if len(columns) > 1:
        for name, cells in columns.items():
            _check_present(ids, name, cells, problems)
            for item, cell in zip(ids, cells, strict=True):
                if not is_missing(cell) and number(cell) not in (0.0, 1.0):
                    problems.add("label", f"item {item!r}: {name} is {cell!r}; a multilabel column holds 0 or 1")
        classes = tuple(columns)
        held = [{n for n in classes if number(columns[n][i]) == 1} for i in range(len(ids))]
    else:
        (cells,) = columns.values()
        parts = [_parts(c) for c in cells]
        words = iter(_words([p for of_item in parts for p in of_item]))
        held = [{next(words) for _ in of_item} for of_item in parts]
        classes = tuple(_ordered(set().union(*held)))
    y = torch.tensor([[float(c in item) for c in classes] for item in held]).reshape(len(ids), len(classes))
    if not classes:
        problems.add("one class", "no item has any label; a probe needs labels that some items have and others lack")
    for i, name in enumerate(classes):
        if len(ids) and y[:, i].min() == y[:, i].max():
            state = "every" if y[0, i] else "no"
            problems.add(
                "one class", f"label {name!r} is on {state} item; leave it out, there is nothing to tell apart"
            )
    return Target(y, "multilabel", classes)


def _regression(ids: Sequence[str], columns: Mapping[str, Column], problems: Problems) -> Target | None:
    if len(columns) == 1 and any(isinstance(c, list) for c in next(iter(columns.values()))):
        ((name, cells),) = columns.items()
        width = max(len(c) for c in cells if isinstance(c, list))
        for item, cell in zip(ids, cells, strict=True):
            if not isinstance(cell, list) or len(cell) != width:
                problems.add("label", f"item {item!r}: {name} is {cell!r}; expected {width} numbers")
                return None
        columns = {f"{name} {i}": [c[i] for c in cells] for i in range(width)}
    for name, cells in columns.items():
        _check_present(ids, name, cells, problems)
        for item, cell in zip(ids, cells, strict=True):
            value = number(cell)
            if not is_missing(cell) and (value is None or not np.isfinite(value)):
                problems.add("label", f"item {item!r}: {name} is {cell!r}; a regression target is a finite number")
        if len({number(c) for c in cells}) == 1:
            problems.add(
                "one class", f"column {name!r} holds one value only, {cells[0]!r}; there is nothing to predict"
            )
    y = torch.tensor([[number(column[i]) or 0.0 for column in columns.values()] for i in range(len(ids))])
    return Target(y.float(), "regression", tuple(columns))


def _check_present(ids: Sequence[str], name: str, cells: Column, problems: Problems) -> None:
    for item, cell in zip(ids, cells, strict=True):
        if is_missing(cell):
            problems.add("no label", f"item {item!r} has no {name}; give it one or leave the item out")


def _parts(cell: Any) -> list[Any]:
    if is_missing(cell):
        return []
    return [p for p in (cell if isinstance(cell, list) else str(cell).split(SEPARATOR)) if not is_missing(p)]


def _words(cells: Sequence[Any]) -> list[str]:
    """The class that each cell names: whole numbers without a point, unless two names would become one.

    >>> _words(["1.0", "0.0"]), _words(["1.0", "1"]), _words(["01", 1.0])
    (['1', '0'], ['1.0', '1'], ['01', '1'])
    """
    as_written = [str(c).strip() if isinstance(c, str | bool) else _word(c) for c in cells]
    short = [_word(c) for c in cells]
    return short if len(set(short)) == len(set(as_written)) else as_written


def _word(cell: Any) -> str:
    value = None if isinstance(cell, bool) else number(cell)
    if value is not None and value.is_integer():
        return str(int(value))
    return str(cell).strip()


def _ordered(words: set[str]) -> list[str]:
    numbers = {w: number(w) for w in words}
    if all(v is not None for v in numbers.values()):
        return sorted(words, key=lambda w: (numbers[w] or 0.0, w))
    return sorted(words)
