"""What every reader gives: names, columns of labels, and a way to fill one tensor with the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cenote.features.table import Column
from cenote.features.validate import Problems


class Edges(NamedTuple):
    """Edges between the tokens of all items, rows of `Filled.values`, and what is known of each."""

    edge_index: Int[Tensor, "2 edges"]
    edge_attr: Shaped[Tensor, "edges *channels"] | None = None


class Filled(NamedTuple):
    """The tokens of all items one after the other, how many each has, the edges between them where items are graphs, and a
    label per token where the file has them."""

    values: Float[Tensor, "total dim"]
    lengths: list[int]
    edges: Edges | None = None
    token_labels: Int[Tensor, "total"] | None = None


@dataclass(frozen=True)
class Source:
    """Data on disk, before the tokens are read.

    Attributes:
        format: in words.
        ids: a name per item.
        columns: label, split, group columns; a cell per item, read when asked for.
        load: reads the tokens of all items; `None` where problems left nothing to read.
        class_names: names of the classes of columns that store class numbers.
        used: columns that are known not to be labels.
        layers: numbers of the layers, where each token holds several side by side, `[total, layers * dim]`.
    """

    format: str
    ids: list[str]
    columns: Mapping[str, Column]
    load: Callable[[Problems], Filled | None]
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    layers: tuple[int, ...] = ()


class LazyColumns(Mapping[str, Column]):
    """Columns that are read when asked for."""

    def __init__(self, names: list[str], read: Callable[[str], Column]) -> None:
        self._names = names
        self._read = read
        self._known: dict[str, Column] = {}

    def __getitem__(self, name: str) -> Column:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
