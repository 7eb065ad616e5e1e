"""What is compared: reducers by factors, the index of all vectors, and the controls that are always there."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from cenote.catalog import method, methods
from cenote.compare.arms import Arm, OnShare, unheard
from cenote.compare.cells import Cell
from cenote.core import InputError
from cenote.features.vectors import ExactStore
from cenote.jobs.reduce import measure
from cenote.jobs.reduce.indexes import RAW, ROWS, UNIT, Indexes, Wanted
from cenote.jobs.reduce.pooling import KIND, ROOM, Family

BASELINE = "unreduced"
ONE_MEAN = "one-mean"
ALWAYS = ("sequential", "first-k", "random-drop")
CONTROLS = ("first-k", "random-drop")
FACTORS = (2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, eq=False)
class Index(Arm):
    """One index of the collection, searched by all queries.

    A cell holds nDCG@10 as `scores`, `[seeds, queries]`; `mrr` and `recall` likewise; `first`, the numbers of the first ten
    documents `[queries, ten]`, of the first seed.

    Attributes:
        name: of the arm: the reducer and its factor.
        summary: one line for people.
        indexes: who makes it.
        wanted: which one, per seed; empty of the index of all vectors.
        control: whether it is one that must lose.
    """

    name: str
    summary: str = field()
    reducer: str
    indexes: Indexes
    wanted: tuple[Wanted, ...] = ()
    control: bool = False
    reference: bool = False

    def key(self) -> Mapping[str, Any]:
        first = self.wanted[0] if self.wanted else None
        return {
            "collection": self.indexes.bench.fingerprint(),
            "reducer": self.reducer,
            "factor": None if first is None else first.factor,
            "norm": None if first is None else first.norm,
            "seeds": [w.seed for w in self.wanted],
        }

    def sources(self) -> tuple[type | ModuleType, ...]:
        family = self.wanted[0].family if self.wanted else None
        return (type(self), measure, *(() if family is None else (method(family.built).load(),)))

    def unfit(self) -> str | None:
        """Why its reducer cannot be used on these documents."""
        return self.indexes.unfit(self.wanted[0]) if self.wanted else None

    def gains_by_processes(self) -> bool:
        """Indexes of one family are made in one pass, and products use the threads that there are."""
        return False

    def run(self, on_share: OnShare = unheard) -> Cell:
        bench, start = self.indexes.bench, time.perf_counter()
        found, record = [], {}
        for number, wanted in enumerate(self.wanted or (None,)):
            store: ExactStore = bench.documents if wanted is None else self.indexes.of(wanted)
            on_share(self.name, (number + 0.6) / max(len(self.wanted), 1))
            found.append(bench.asked(store))
            if not number:
                record = {
                    "reducer": self.reducer,
                    "factor": 1.0 if wanted is None else wanted.factor,
                    "norm": UNIT if wanted is None else wanted.norm,
                    "vectors": store.vectors,
                    "bytes": store.nbytes,
                    "search_ms": bench.milliseconds(store),
                    "pool_ms": None if wanted is None else self.indexes.pool_ms(wanted),
                }
        tensors = {name: torch.stack([f[name] for f in found]) for name in ("scores", "mrr", "recall")}
        record |= {
            "mrr": float(tensors["mrr"].mean()),
            "recall": float(tensors["recall"].mean()),
            "settings": {"factor": record["factor"], "norm": record["norm"]},
            "seconds": time.perf_counter() - start,
        }
        return Cell(self.name, record, {**tensors, "first": found[0]["first"]})


def families(wanted: str | Sequence[str], factors: Sequence[float]) -> list[Family]:
    """Those of `"fast"`, `"all"`, or named methods (commas in a text separate), and those that are always compared.

    Raises:
        InputError: naming what does not reduce documents, or a factor that reduces nothing.
    """
    if not factors or not all(math.isfinite(f) and f > 1 for f in factors):
        told = ", ".join(f"{f:g}" for f in factors) or "none"
        raise InputError(f"factors: expected numbers above 1, such as 2,3,4, got {told}; 1 leaves all vectors")
    if wanted in ("fast", "all"):
        names = [m.name for m in methods(room=ROOM, kind=KIND) if wanted == "all" or m.fast]
    else:
        names = [n.strip() for n in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
        if not names or "" in names:
            raise InputError("methods: the list has no name in it; try --methods fast")
    found = {f.built: f for f in (Family.of(name, factors[0]) for name in (*names, *ALWAYS))}
    return list(found.values())


def arms(indexes: Indexes, wanted: Sequence[Family], seeds: Sequence[int]) -> list[Index]:
    """An arm for each index: all vectors, each family by each factor, of means in both norms, and one mean per document."""
    found = [Index(BASELINE, "all vectors", BASELINE, indexes)]
    for family in wanted:
        drawn = tuple(seeds) if family.draws else (0,)
        for factor in indexes.factors:
            for name, norm in ((family.member, ROWS), (family.unit, UNIT), (family.raw or _left(family), RAW)):
                if name is None:
                    continue
                asked = tuple(Wanted(family, factor, norm, seed) for seed in drawn)
                summary = _summary(family, name, norm)
                found.append(
                    Index(f"{name} x{factor:g}", summary, name, indexes, asked, control=family.built in CONTROLS)
                )
    each = indexes.bench.documents.vectors / len(indexes.bench.documents)
    for name, norm in ((ONE_MEAN, UNIT), (f"{ONE_MEAN}-raw", RAW)):
        told = "the mean of each document" + ("" if norm == UNIT else ", as it is")
        found.append(Index(name, told, name, indexes, (Wanted(None, each, norm),), control=True))
    return found


def count(wanted: Sequence[Family], factors: Sequence[float]) -> int:
    """How many arms there will be."""
    each = sum(1 if family.member is not None else 2 for family in wanted)
    return 3 + each * len(set(factors))


def _summary(family: Family, name: str, norm: str) -> str:
    """The catalog's, of the raw form where it has one."""
    if norm != RAW:
        return family.summary
    known = next((m.summary for m in methods(room="reduce") if m.name == name), None)
    return known or f"{family.summary}; means as they are"


def _left(family: Family) -> str | None:
    """What the means of a family without a raw method are called where they are left as they are."""
    return None if family.member is not None else f"{family.unit}-raw"
