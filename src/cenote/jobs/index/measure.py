"""What a store finds of what it should find."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from cenote.core import Bags, InputError
from cenote.core.maxsim import Found, merged
from cenote.core.maxsim import search as exact_search
from cenote.features.vectors import Hits


@runtime_checkable
class Readable(Protocol):
    """A store whose vectors can be read back."""

    def search(self, bags: Bags, k: int = 10) -> Hits:
        """See `cenote.features.vectors.VectorStore`."""

    def batches(self) -> Iterator[tuple[list[str], Bags]]:
        """Ids and vectors of some documents after the other."""


class Recall(NamedTuple):
    """`recall`: share of the true first `k` that a store finds, mean over queries; `ms`: of one query, the median."""

    recall: float
    k: int
    ms: float
    queries: int


def recall_of(store: Readable, queries: Bags, k: int = 10) -> Recall:
    """Compare what a store finds with exact MaxSim over the vectors that it holds.

    Raises:
        InputError: where it holds nothing.
    """
    names: list[str] = []
    best: Found | None = None
    for ids, bags in store.batches():
        found = exact_search(queries, bags, k)
        found = found._replace(numbers=found.numbers + len(names))
        best = found if best is None else merged(best, found, k)
        names += ids
    if best is None:
        raise InputError("store: holds no document; add some first")
    shares, times = [], []
    for row, numbers in enumerate(best.numbers.tolist()):
        start = time.perf_counter()
        hits = store.search(queries.select(torch.tensor([row])), k)
        times.append(1000 * (time.perf_counter() - start))
        true = {names[n] for n in numbers}
        shares.append(len(true & set(hits.ids[0])) / len(true))
    return Recall(statistics.mean(shares), k, statistics.median(times), len(queries))
