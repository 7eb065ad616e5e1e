"""The reduced indexes of a collection, written in one pass for all that a method is tried with."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cenote.catalog import method
from cenote.compare.sources import source_digest
from cenote.core import Bags, InputError
from cenote.core.threads import one_thread
from cenote.features.vectors import ExactStore
from cenote.jobs.reduce import pooling
from cenote.jobs.reduce.measure import Bench
from cenote.jobs.reduce.pooling import Family, means, reduced, unit_norm

FOLDER = "indexes"
TIMED = 64
"""Documents whose reduction is timed."""
ROWS, UNIT, RAW = "rows", "unit", "raw"


@dataclass(frozen=True)
class Wanted:
    """Which index of a family: `family` is `None` of one mean vector per document."""

    family: Family | None
    factor: float
    norm: str
    seed: int = 0


class Indexes:
    """Makes indexes when they are asked for: all of a family and seed at once, in place of those of the last one.

    Args:
        bench: the collection.
        factors: that each family is tried with.
    """

    def __init__(self, bench: Bench, factors: Sequence[float]) -> None:
        self.bench, self.factors = bench, tuple(factors)
        self._tried: dict[tuple[str, float], str | None] = {}

    def unfit(self, wanted: Wanted) -> str | None:
        """Why the collection cannot be reduced so, tried on two documents; `None` where it can."""
        if wanted.family is None:
            return None
        key = (wanted.family.built, wanted.factor)
        if key not in self._tried:
            try:
                self._made(wanted.family, [wanted.factor], wanted.seed, self.bench.sample(2))
                self._tried[key] = None
            except InputError as error:
                self._tried[key] = str(error)
        return self._tried[key]

    def of(self, wanted: Wanted) -> ExactStore:
        """The index, whole."""
        places = {w: self._place(w) for w in self._together(wanted)}
        self._remove_others(places[wanted].parent)
        stores = {w: self._opened(w, place) for w, place in places.items()}
        if any(len(store) < len(self.bench.documents) for store in stores.values()):
            self._fill(wanted, stores)
        return stores[wanted]

    def pool_ms(self, wanted: Wanted) -> float:
        """CPU time of reducing one document by this factor alone, on one thread: the mean of some of the collection."""
        sample = self.bench.sample(TIMED)
        with one_thread():
            start = time.process_time()
            self._made(wanted.family, [wanted.factor], wanted.seed, sample)
        return 1000 * (time.process_time() - start) / len(sample)

    def remove(self) -> None:
        """All of them."""
        shutil.rmtree(self.bench.folder / FOLDER, ignore_errors=True)

    def _fill(self, wanted: Wanted, stores: dict[Wanted, ExactStore]) -> None:
        for ids, bags in self.bench.documents.batches():
            if not any(store.missing(ids) for store in stores.values()):
                continue
            made = self._made(wanted.family, list(dict.fromkeys(one.factor for one in stores)), wanted.seed, bags)
            for one, store in stores.items():
                found = made[one.factor]
                store.add(ids, unit_norm(found) if one.norm == UNIT else found)
        for one, store in stores.items():
            if store.vectors >= self.bench.documents.vectors:
                name = "one mean" if one.family is None else one.family.built
                raise InputError(f"{name}: reduced nothing at factor {one.factor:g}")

    def _made(self, family: Family | None, factors: Sequence[float], seed: int, bags: Bags) -> dict[float, Bags]:
        if family is None:
            return {factors[0]: means(bags)}
        return reduced(family, factors, bags, self.bench.protect, seed)

    def _together(self, wanted: Wanted) -> list[Wanted]:
        """All that one pass makes."""
        if wanted.family is None:
            return [replace(wanted, norm=norm) for norm in (UNIT, RAW)]
        each = [replace(wanted, factor=f, norm=norm) for f in self.factors for norm in norms_of(wanted.family)]
        return [one for one in each if self.unfit(one) is None]

    def _opened(self, wanted: Wanted, place: Path) -> ExactStore:
        name = "one-mean" if wanted.family is None else wanted.family.built
        meta = replace(
            self.bench.documents.meta, method=name, factor=float(wanted.factor), unit_norm=wanted.norm != RAW
        )
        return ExactStore(place, meta)

    def _place(self, wanted: Wanted) -> Path:
        built = "one-mean" if wanted.family is None else wanted.family.built
        code = source_digest(pooling, *(() if wanted.family is None else (method(built).load(),)))
        key = hashlib.sha256(repr((self.bench.fingerprint(), code, self.factors)).encode()).hexdigest()
        return self.bench.folder / FOLDER / f"{built}-{wanted.seed}-{key[:16]}" / f"x{wanted.factor:g}-{wanted.norm}"

    def _remove_others(self, place: Path) -> None:
        for other in place.parent.glob("*") if place.parent.is_dir() else ():
            if other != place:
                shutil.rmtree(other, ignore_errors=True)


def norms_of(family: Family) -> tuple[str, ...]:
    """What a family's vectors may be: rows of the input, or means of either norm."""
    return (ROWS,) if family.member is not None else (UNIT, RAW)
