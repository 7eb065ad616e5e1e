"""From the columns of a table to numbers of features and their values.

Source: Song et al. (2019), arXiv 1810.11921.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any, Literal, Self, get_args

import numpy as np
import torch

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_several
from cenote.mix.autoint.training import Rows

Kind = Literal["category", "number", "several"]
Scaling = Literal["standard", "log_square", "quantiles", "none"]
"""Of numbers: mean 0 and deviation 1; `floor((ln z)^2)` above 2, as for Criteo; the category of a quantile; as they are."""
BINS = 10


@dataclass(frozen=True)
class Column:
    """What was learned of a column.

    Attributes:
        name: of the column.
        kind: `"category"`, `"number"`, or `"several"` categories at once.
        first: the number of its first feature; of categories that is the unknown one.
        values: from a category to how far behind `first` its feature stands.
        mean, deviation: of a number.
        edges: between the quantiles of a number, where it is one of `quantiles`.
    """

    name: str
    kind: Kind
    first: int
    values: dict[str, int] = field(default_factory=dict)
    mean: float = 0.0
    deviation: float = 1.0
    edges: tuple[float, ...] | None = None

    @property
    def features(self) -> int:
        """How many it has."""
        if self.kind == "number":
            # of quantiles the unknown one, and one more than edges
            return 1 if self.edges is None else len(self.edges) + 2
        return len(self.values) + 1


class TableEncoder:
    """Numbers features of a table's columns: one per category that is not rare, one for all others, one per number.

    Missing and unseen categories are the unknown feature of their column. A missing number is 0, behind scaling.

    Args:
        categorical: columns whose numbers are names; columns of texts and truth values are categories anyway.
        scaling: of numbers, see `Scaling`.
        min_count: a category that is rarer among the rows that it is fitted on is unknown, so that this has rows to learn
            from. Of the published data sets 10, 5 and 10 (recalled).

    Example:
        >>> encoder = TableEncoder(min_count=1).fit({"colour": ["red", "blue"], "size": [1.0, 3.0]})
        >>> rows = encoder.transform({"colour": ["green", "red"], "size": [None, 3.0]})
        >>> rows.features.tolist(), rows.value.tolist()
        ([[0, 3], [2, 3]], [[1.0, 0.0], [1.0, 1.0]])
    """

    def __init__(self, categorical: Collection[str] = (), *, scaling: Scaling = "standard", min_count: int = 2) -> None:
        require_one_of(get_args(Scaling), scaling=scaling)
        require_at_least(1, min_count=min_count)
        require_several(categorical=categorical)
        self.categorical, self.scaling, self.min_count = tuple(map(str, categorical)), scaling, min_count
        self.columns: tuple[Column, ...] = ()

    @property
    def features(self) -> int:
        """How many numbers there are, of all columns together."""
        return sum(column.features for column in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, in the order of the fields."""
        return tuple(column.name for column in self.columns)

    def fit(self, table: Any) -> Self:
        """Learn the features of a table: a data frame, a table of pyarrow, a mapping of columns, or an array.

        Raises:
            InputError: for a table without rows or columns, or a name under `categorical` that is no column.
        """
        columns = columns_of(table)
        strangers = [name for name in self.categorical if name not in columns]
        if strangers:
            raise InputError(f"categorical: {', '.join(strangers)} is no column; there are: {', '.join(columns)}")
        if not len(next(iter(columns.values()))):
            raise InputError("table: has no rows")
        first, found = 0, []
        for name, values in columns.items():
            found.append(self._learned(name, values, first))
            first += found[-1].features
        self.columns = tuple(found)
        return self

    def transform(self, table: Any) -> Rows:
        """Rows of a table with the same columns, in any order; others are left alone.

        Raises:
            InputError: where a column is missing, or holds what it did not hold when it was fitted.
        """
        if not self.columns:
            raise InputError("encoder: has learned no columns yet; fit it first")
        columns = columns_of(table)
        missing = [name for name in self.names if name not in columns]
        if missing:
            raise InputError(f"table: lacks the columns {', '.join(missing)}, which it was fitted with")
        fields = [_encoded(column, columns[column.name], self.scaling) for column in self.columns]
        if not any(column.kind == "several" for column in self.columns):
            index = torch.tensor([[cell[0][0] for cell in cells] for cells in fields])
            value = torch.tensor([[cell[0][1] for cell in cells] for cells in fields])
            return Rows(index.long().T.contiguous(), value.float().T.contiguous())
        most = max((len(cell) for column in fields for cell in column), default=1)
        count = len(fields[0])
        index = torch.zeros(count, len(fields), most, dtype=torch.long)
        value = torch.zeros(count, len(fields), most)
        present = torch.zeros(count, len(fields), most, dtype=torch.bool)
        for f, cells in enumerate(fields):
            for r, cell in enumerate(cells):
                for place, (number, amount) in enumerate(cell):
                    index[r, f, place], value[r, f, place], present[r, f, place] = number, amount, True
        return Rows(index, value, present)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON holds it; `of_state` makes the same again."""
        return {
            "categorical": list(self.categorical),
            "scaling": self.scaling,
            "min_count": self.min_count,
            "columns": [asdict(column) for column in self.columns],
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """What `state` gave.

        Raises:
            InputError: where it is something else.
        """
        try:
            made = cls(state["categorical"], scaling=state["scaling"], min_count=state["min_count"])
            made.columns = tuple(
                Column(**{**one, "edges": None if one["edges"] is None else tuple(one["edges"])})
                for one in state["columns"]
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"state: is not that of an encoder of tables ({error}); save it again") from error
        return made

    def _learned(self, name: str, values: Sequence[Any], first: int) -> Column:
        kind = "category" if name in self.categorical else _kind(values)
        if kind == "number":
            numbers = np.array([float(v) for v in values if not is_missing(v)])
            if not np.isfinite(numbers).all():
                raise InputError(f"table: column {name!r} holds infinite numbers")
            if self.scaling == "quantiles":
                cuts = np.unique(np.quantile(numbers, np.arange(1, BINS) / BINS)) if len(numbers) else np.zeros(0)
                return Column(name, kind, first, edges=tuple(cuts.tolist()))
            if self.scaling != "standard" or not len(numbers):
                return Column(name, kind, first)
            deviation = float(numbers.std())
            # of a column whose numbers are all the same
            return Column(name, kind, first, mean=float(numbers.mean()), deviation=deviation or 1.0)
        items = [v for v in values if not is_missing(v)]
        counts = Counter(_key(v) for cell in items for v in (cell if kind == "several" else [cell]))
        kept = sorted(key for key, count in counts.items() if count >= self.min_count)
        return Column(name, kind, first, {key: i + 1 for i, key in enumerate(kept)})


def log_square(z: float) -> float:
    """`floor((ln z)^2)` above 2, else as it is.

    >>> log_square(1.5), log_square(100.0), log_square(-3.0)
    (1.5, 21.0, -3.0)
    """
    return float(math.floor(math.log(z) ** 2)) if z > 2 else float(z)


def columns_of(table: Any) -> dict[str, list[Any]]:
    """Columns by their names, of a data frame, a table of pyarrow, a mapping, or an array `[rows, columns]` (`x0`, `x1`, ...).

    Raises:
        InputError: for something else, or columns of several lengths or one name.
    """
    if isinstance(table, Mapping):
        found = {str(name): list(values) for name, values in table.items()}
    elif hasattr(table, "column_names") and hasattr(table, "column"):
        found = {str(name): table.column(name).to_pylist() for name in table.column_names}
    elif hasattr(table, "columns") and hasattr(table, "iloc"):
        if len(set(map(str, table.columns))) < len(table.columns):
            raise InputError("table: has several columns of one name")
        found = {str(name): list(table.iloc[:, i]) for i, name in enumerate(table.columns)}
    else:
        array = table.numpy() if isinstance(table, torch.Tensor) else np.asarray(table)
        if array.ndim != 2:
            raise InputError(
                f"table: expected a data frame, a mapping of columns, or an array [rows, columns], got "
                f"{type(table).__name__} of shape {list(array.shape)}"
            )
        found = {f"x{i}": list(column) for i, column in enumerate(array.T)}
    if not found:
        raise InputError("table: has no columns")
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"table: columns have several lengths: {lengths}")
    return found


def _encoded(column: Column, values: Iterable[Any], scaling: Scaling) -> list[list[tuple[int, float]]]:
    """Of each row the numbers of features of this column, and their values."""
    if column.kind == "number":
        return [[_number(column, v, scaling)] for v in values]
    found = []
    for cell in values:
        if column.kind == "several":
            keys = [] if is_missing(cell) else [_key(v) for v in _items(column.name, cell)]
        else:
            if _is_several(cell):
                raise InputError(
                    f"table: column {column.name!r} holds several values at once, and held one when fitted"
                )
            keys = [] if is_missing(cell) else [_key(cell)]
        found.append([(column.first + column.values.get(key, 0), 1.0) for key in keys] or [(column.first, 1.0)])
    return found


def _number(column: Column, value: Any, scaling: Scaling) -> tuple[int, float]:
    missing = is_missing(value)
    if not missing:
        if isinstance(value, bool) or not isinstance(value, (Real, np.number)):
            raise InputError(
                f"table: column {column.name!r} holds {value!r}, and held numbers when it was fitted; give numbers"
            )
        if math.isinf(float(value)):
            raise InputError(f"table: column {column.name!r} holds infinite numbers")
    if column.edges is not None:
        return column.first + (0 if missing else int(np.searchsorted(column.edges, float(value), "right")) + 1), 1.0
    if missing:
        return column.first, 0.0
    z = log_square(float(value)) if scaling == "log_square" else (float(value) - column.mean) / column.deviation
    return column.first, z


def _kind(values: Sequence[Any]) -> Kind:
    there = [v for v in values if not is_missing(v)]
    if there and all(_is_several(v) for v in there):
        return "several"
    numbers = [isinstance(v, (Real, np.number)) and not isinstance(v, (bool, np.bool_)) for v in there]
    return "number" if there and all(numbers) else "category"


def _is_several(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset, np.ndarray))


def _items(name: str, cell: Any) -> Iterable[Any]:
    if not _is_several(cell):
        raise InputError(f"table: column {name!r} holds {cell!r}, and held lists of categories when it was fitted")
    return cell


def is_missing(value: Any) -> bool:
    """None, NaN, pandas' NA and NaT, an empty text.

    >>> is_missing(float("nan")), is_missing(""), is_missing(0)
    (True, True, False)
    """
    if value is None or (isinstance(value, str) and not value):
        return True
    if _is_several(value):
        return False
    try:
        return bool(value != value)
    except TypeError:
        # pandas' NA is neither
        return True


def _key(value: Any) -> str:
    """Of a category: whole numbers are the same with and without a fraction, as data frames turn one into the other."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value.item() if isinstance(value, np.generic) else value)
