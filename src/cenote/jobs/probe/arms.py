"""What a comparison compares: every token pool at every chosen layer, and every layer pool on the stack of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from cenote.catalog import Method, import_own, method, methods
from cenote.compare.arms import Arm, OnShare, unheard
from cenote.compare.cells import Cell
from cenote.compare.metrics import METRICS
from cenote.core import InputError
from cenote.core.seeded import seeded
from cenote.features.dataset import TokenDataset
from cenote.jobs.probe import cost, module, training
from cenote.jobs.probe.module import Probe, build_probe
from cenote.jobs.probe.own import Choice, Given, OwnMethod
from cenote.jobs.probe.recipe import Recipe
from cenote.models.base import layer_numbers
from cenote.testing import ContractError, check_pool
from cenote.testing.pools import LONG

BASELINE = "mean"
KINDS = ("sets", "layers", "graphs")
EMBEDDINGS = 0

MAX_PAIRWISE_TOKENS = 8192

OWN_TOKENS = 9
"""That a pool of one's own is tried on, where items differ."""

LARGEST_COPY = 2**31
"""Bytes of features that are written to a temporary file for other processes."""

Layers = str | int | Sequence[int] | None
Fingerprint = Callable[[TokenDataset], str]


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

    @property
    def builds(self) -> str | OwnMethod:
        """What `build_probe` takes."""
        return self.method if isinstance(self.method, OwnMethod) else self.method.name

    @property
    def own(self) -> bool:
        """Whether its pool is somebody's own."""
        return isinstance(self.method, OwnMethod) or "." in self.method.name


@dataclass(frozen=True)
class Trial(Arm):
    """One column to train, and how: everything that its cell follows from.

    A cell holds the test logits as `scores`, `[seeds, items, outputs]`, and as `state.S.NAME` the probe of seed number S.

    Attributes:
        column: what is trained, on which view of the data.
        metric: decides on validation.
        seeds: of the initialisations.
        recipe: of the training.
        fingerprint: of data, remembered for all columns that read the same.
    """

    column: Column
    metric: str
    seeds: tuple[int, ...]
    recipe: Recipe
    fingerprint: Fingerprint = TokenDataset.fingerprint

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the column."""
        return self.column.name

    @property
    def summary(self) -> str:  # type: ignore[override]
        """That of the method."""
        return self.column.method.summary

    def key(self) -> Mapping[str, Any]:
        """Data, settings, recipe, seeds, metric; of a pool of one's own what it is at its beginning."""
        method, data = self.column.method, self.column.data
        return {
            **({"pool": method.key(data)} if isinstance(method, OwnMethod) else {}),
            "data": self.fingerprint(self.column.data),
            "method": self.column.method.path,
            "settings": dict(self.column.method.settings or {}),
            "recipe": dataclasses.asdict(self.recipe),
            "seeds": self.seeds,
            "metric": self.metric,
        }

    def sources(self) -> tuple[type | ModuleType, ...]:
        """The pool, and what trains and measures its probe."""
        method = self.column.method
        pool = method.sources(self.column.data) if isinstance(method, OwnMethod) else (method.load(),)
        return (*pool, type(self), Trial, module, training, cost)

    def unfit(self) -> str | None:
        """Why the pool cannot be trained on such data."""
        name, data = self.column.method.name, self.column.data
        try:
            pool = build_probe(self.column.builds, data).pool
        except InputError as error:
            return str(error).removeprefix(f"{name}: ")
        if self.column.own and self.column.method.kind == "sets":
            try:
                check_pool(pool, tokens=data.tokens or OWN_TOKENS, leave_out=LONG)
            except ContractError as error:
                return f"breaks what every pool keeps:\n{error}"
        if getattr(pool, "pairwise", False) and int(data.lengths().max()) > MAX_PAIRWISE_TOKENS:
            longest = int(data.lengths().argmax())
            return (
                f"its tokens attend to each other, which at the {int(data.lengths()[longest]):,} tokens of item "
                f"{data.ids[longest]!r} would take too long; the limit is {MAX_PAIRWISE_TOKENS:,}"
            )
        return None

    def run(self, on_share: OnShare = unheard) -> Cell:
        """The trained cell."""
        data = self.column.data
        trained = training.train(
            self.build,
            data,
            METRICS[self.metric],
            self.seeds,
            self.recipe,
            lambda share: on_share(self.name, 0.95 * share),
        )
        test = data.indices("test")
        scores = torch.stack([training.predict(p, data, test, self.recipe.tokens_at_once) for p in trained.probes])
        probe = trained.probes[0]
        record = {
            "settings": dict(self.column.method.settings or {}),
            "layers": self.column.layers,
            "validation_per_seed": trained.validation,
            "learning_rate": trained.learning_rate,
            "validation_by_rate": trained.by_rate,
            "epochs": trained.epochs,
            "parameters": cost.parameters(probe),
            "multiply_adds": cost.multiply_adds(probe, data),
            "seconds": trained.seconds,
            "train_loss": trained.train_loss,
            "validation_curve": trained.validation_curve,
        }
        states: dict[str, Tensor] = {
            f"state.{s}.{name}": value for s, p in enumerate(trained.probes) for name, value in p.state_dict().items()
        }
        return Cell(self.name, record, {"scores": scores, **states})

    def finish(self, cell: Cell) -> Cell:
        """The same cell with the latency of its probe."""
        if "latency_ms" in cell.record:
            return cell
        return cell.with_record(latency_ms=cost.latency_ms(self.probe(cell, 0), self.column.data))

    def work(self) -> int:
        """Multiply-adds for one item."""
        return cost.multiply_adds(self.build(), self.column.data)

    def gains_by_processes(self) -> bool:
        """Whether its steps are small, and its data can be copied."""
        data = self.column.data
        return training.steps_are_small(data, self.recipe) and data.nbytes() <= LARGEST_COPY

    def travelling(self) -> Self:
        """The same, without what only reports and keys need."""
        data = dataclasses.replace(self.column.data, images=None, words=None)
        column = dataclasses.replace(self.column, data=data)
        return dataclasses.replace(self, column=column, fingerprint=TokenDataset.fingerprint)

    def build(self) -> Probe:
        """A fresh probe."""
        # of one's own, in another process
        self.column.method.load()
        return build_probe(self.column.builds, self.column.data)

    def probe(self, cell: Cell, seed_number: int) -> Probe:
        """The trained probe of one seed."""
        prefix = f"state.{seed_number}."
        with seeded(0):
            probe = self.build()
        probe.load_state_dict({k.removeprefix(prefix): v for k, v in cell.tensors.items() if k.startswith(prefix)})
        return probe.eval()


def remembered() -> Fingerprint:
    """Fingerprints; each view of the data is read once."""
    known: dict[int, tuple[TokenDataset, str]] = {}

    def fingerprint(view: TokenDataset) -> str:
        # the view is kept, so that no other can get its number
        return known.setdefault(id(view), known.get(id(view)) or (view, view.fingerprint()))[1]

    return fingerprint


def chosen_methods(
    wanted: str | Sequence[Choice], layered: bool = False, edges: bool = False
) -> tuple[str | Given, ...]:
    """Pools by name: `"fast"`, `"all"`, or a list (commas in a text separate). `mean` is always among them.

    Args:
        wanted: as said; a dotted path names a pool of your own, whose module is imported. In a list also classes, pools, and
            names with a pool or with a function of the width of a token.
        layered: whether `"fast"` and `"all"` include pools of layers.
        edges: whether they include pools of graphs.

    Raises:
        InputError: naming what is no pool of token sets, of layers or of graphs.
    """
    chosen: list[str | Given]
    if isinstance(wanted, str) and wanted in ("all", "fast"):
        kinds = [k for k, there in zip(KINDS, (True, layered, edges), strict=True) if there]
        fast = True if wanted == "fast" else None
        chosen = [m.name for kind in kinds for m in methods(room="pool", kind=kind, fast=fast)]
    else:
        chosen = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else [_asked(w) for w in wanted]
        if not chosen or "" in chosen:
            raise InputError("methods: the list has no name in it; try --methods fast")
    for name in chosen:
        if isinstance(name, str):
            import_own(name)
    found = {n.name if isinstance(n, Given) else method(n).name: n for n in (BASELINE, *chosen)}
    for name, asked in found.items():
        if isinstance(asked, str):
            _require_pool(method(name))
    twice = sorted({g.name for g in chosen if isinstance(g, Given) and found[g.name] is not g} | _clashing(chosen))
    if twice:
        raise InputError(
            f'methods: {", ".join(twice)} names several; give your own other names: ("mine", {twice[0]}(...))'
        )
    return tuple(asked if isinstance(asked, Given) else name for name, asked in found.items())


def _clashing(chosen: Sequence[str | Given]) -> set[str]:
    names = {BASELINE, *(method(n).name for n in chosen if isinstance(n, str))}
    return names & {g.name for g in chosen if isinstance(g, Given)}


def _require_pool(entry: Method) -> None:
    if entry.room != "pool" or entry.kind not in KINDS:
        raise InputError(f"methods: {entry.name} is not a pool of token sets but lives in {entry.room} ({entry.kind})")


def _asked(wanted: object) -> str | Given:
    """A method's name; of a class its dotted path, by which it is found again."""
    if isinstance(wanted, str):
        return wanted
    if not isinstance(wanted, type):
        return Given.read(wanted)
    if "<" not in wanted.__qualname__ and "." not in wanted.__qualname__:
        return f"{wanted.__module__}.{wanted.__qualname__}"
    raise InputError(
        f"methods: {wanted!r} stands inside of another class or of a function, where it is not found again; define it at the "
        f'top of a module, or give a function, ("mine", lambda dim: {wanted.__name__}(dim))'
    )


def columns_of(
    data: TokenDataset, wanted: str | Sequence[Choice], layers: Layers = None
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
    for asked in names:
        entry = method(asked) if isinstance(asked, str) else asked.entry(data.dim)
        _require_pool(entry)
        name = entry.name
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
