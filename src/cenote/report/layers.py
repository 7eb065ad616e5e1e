"""The map of layers: each pooling at each layer where it was tried."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cenote.compare.statistics import SIGNIFICANT
from cenote.jobs.probe.result import Comparison, MethodResult


@dataclass(frozen=True)
class Cell:
    """One pooling at one layer.

    Attributes:
        strength: 0 at the lowest metric of the map, 1 at the highest.
        best: of its row.
        close: the winner of the comparison, or not distinguishable from it.
    """

    result: MethodResult
    strength: float
    best: bool
    close: bool


@dataclass(frozen=True)
class Row:
    """One pooling; `None` where it was not tried. A pool of layers has one cell for all that it reads."""

    name: str
    cells: tuple[Cell | None, ...]
    whole: bool


@dataclass(frozen=True)
class LayerMap:
    """Rows by the best metric of each, columns by layer."""

    layers: tuple[int, ...]
    rows: tuple[Row, ...]


def layer_map(c: Comparison) -> LayerMap | None:
    """Poolings by layer; `None` where no pooling was tried at several layers."""
    rows: dict[str, dict[int, MethodResult]] = {}
    stacks: dict[str, MethodResult] = {}
    # results are sorted: the first of a pooling is its best
    for r in c.results:
        name, at, _ = r.method.rpartition("@")
        if at and len(r.layers) == 1:
            rows.setdefault(name, {})[r.layers[0]] = r
        elif len(r.layers) > 1:
            rows[r.method], stacks[r.method] = {}, r
    layers = tuple(sorted({n for row in rows.values() for n in row}))
    if len(layers) < 2:
        return None
    values = [r.metric for row in rows.values() for r in row.values()] + [r.metric for r in stacks.values()]
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    apart = {t.first for t in c.against_winner if t.p_adjusted <= SIGNIFICANT}

    def cell(r: MethodResult, best: bool) -> Cell:
        share = (r.metric - low) / (high - low) if high > low and math.isfinite(r.metric) else 0.0
        return Cell(r, round(share, 3), best, r.method not in apart)

    def row(name: str, found: dict[int, MethodResult]) -> Row:
        if name in stacks:
            return Row(name, (cell(stacks[name], False),), True)
        first = next(iter(found.values()))
        return Row(name, tuple(cell(found[n], found[n] is first) if n in found else None for n in layers), False)

    return LayerMap(layers, tuple(row(name, found) for name, found in rows.items()))
