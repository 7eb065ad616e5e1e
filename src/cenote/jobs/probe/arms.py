"""What a comparison compares: every token pool at every chosen layer, and every layer pool on the stack of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cenote.catalog import Method, method, methods
from cenote.core import InputError
from cenote.features.dataset import TokenDataset
from cenote.models.base import layer_numbers

BASELINE = "mean"
KINDS = ("sets", "layers", "graphs")
EMBEDDINGS = 0

Layers = str | int | Sequence[int] | None


@dataclass(frozen=True)
class Column:
    """One row of the leaderboard, before it is trained.

    Attributes:
        name: `simpool`, or `simpool@4` where the same pool is tried at several layers.
        method: the catalog's.
        layers: what it reads; empty where the data do not number their layers.
        data: as it reads them.
    """

    name: str
    method: Method
    layers: tuple[int, ...]
    data: TokenDataset

    @property
    def reads_stack(self) -> bool:
        """Whether it pools layers and tokens together."""
        return self.method.kind == "layers"


def chosen_methods(wanted: str | Sequence[str], layered: bool = False, edges: bool = False) -> tuple[str, ...]:
    """Names of pools: `"fast"`, `"all"`, or a list (commas in a text separate). `mean` is always among them.

    Args:
        wanted: as said.
        layered: whether `"fast"` and `"all"` include pools of layers.
        edges: whether they include pools of graphs.

    Raises:
        InputError: naming what is no pool of token sets, of layers or of graphs.
    """
    if wanted in ("all", "fast"):
        kinds = [k for k, there in zip(KINDS, (True, layered, edges), strict=True) if there]
        fast = True if wanted == "fast" else None
        names = [m.name for kind in kinds for m in methods(room="pool", kind=kind, fast=fast)]
    else:
        names = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
        if not names or "" in names:
            raise InputError("methods: the list has no name in it; try --methods fast")
    for name in names:
        entry = method(name)
        if entry.room != "pool" or entry.kind not in KINDS:
            raise InputError(f"methods: {name} is not a pool of token sets but lives in {entry.room} ({entry.kind})")
    return tuple(dict.fromkeys([BASELINE, *names]))


def columns_of(
    data: TokenDataset, wanted: str | Sequence[str], layers: Layers = None
) -> tuple[list[Column], str, dict[str, str]]:
    """`(columns, name of the baseline, skipped)`: the baseline is the mean of the last chosen layer.

    Raises:
        InputError: where layers are chosen of data that hold one.
    """
    held = data.layers
    several = len(held) > 1
    if layers is not None and not several:
        raise InputError(
            "layers: the data hold one layer; extract several (cenote extract --layers all), or leave it out"
        )
    names = chosen_methods(wanted, layered=several, edges=data.has_edges)
    numbers = layer_numbers(layers, held) if several else ()
    views = {n: data.at(n) for n in numbers}
    stack = tuple(n for n in held if n != EMBEDDINGS)
    columns: list[Column] = []
    skipped: dict[str, str] = {}
    for name in names:
        entry = method(name)
        if entry.kind == "layers":
            if len(stack) < 2:
                skipped[name] = "pools several layers, and the data hold one"
            else:
                columns.append(Column(name, entry, stack, data.only(stack)))
        elif entry.kind == "graphs":
            if not data.has_edges:
                skipped[name] = "reads edges between tokens, and the data have none"
            else:
                columns.append(Column(name, entry, held, data.with_edges()))
        elif not several:
            columns.append(Column(name, entry, held, data))
        else:
            columns += [Column(_named(name, n, numbers), entry, (n,), views[n]) for n in numbers]
    # the layer that is known best comes first: after an interruption the baseline is there
    columns.sort(key=lambda c: c.method.name != BASELINE or (several and c.layers != (numbers[-1],)))
    return columns, columns[0].name, skipped


def _named(name: str, layer: int, numbers: tuple[int, ...]) -> str:
    return name if len(numbers) == 1 else f"{name}@{layer}"
