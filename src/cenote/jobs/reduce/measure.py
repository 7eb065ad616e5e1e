"""What is measured of an index: how well its search answers, what it takes, how fast it is."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cenote.compare.ranking import first_found, found_share, gained
from cenote.core import Bags
from cenote.core.threads import one_thread
from cenote.features.vectors import ExactStore, Hits, VectorStore
from cenote.jobs.reduce.encoding import digest_of

METRIC = "nDCG@10"
NEAR, DEEP = 10, 100
"""Depths: of nDCG, MRR and what is compared with the unreduced index; of recall."""
TIMED, TRIES = 10, 3
"""Queries that are asked one by one, each so many times, to tell how long one takes."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A collection, and the questions that every index of it is asked.

    Attributes:
        documents: all vectors.
        queries: vectors of the queries.
        query_ids: their names.
        gains: of each query, name of a document -> gain.
        protect: leading vectors of a document that are never reduced.
        folder: where indexes are written.
    """

    documents: ExactStore
    queries: Bags
    query_ids: tuple[str, ...]
    gains: tuple[Mapping[str, float], ...]
    protect: int
    folder: Path
    _known: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """Names of the documents."""
        if "ids" not in self._known:
            self._known["ids"] = self.documents.ids
        found: list[str] = self._known["ids"]
        return found

    def lengths(self) -> Int[Tensor, "documents"]:
        """Vectors of each document."""
        return self.documents.lengths()

    def sample(self, most: int) -> Bags:
        """Some of the documents, spread over the collection."""
        numbers = torch.linspace(0, len(self.documents) - 1, min(most, len(self.documents))).round().long()
        return self.documents.select(numbers)

    def fingerprint(self) -> str:
        """That changes with anything that is measured."""
        if "fingerprint" not in self._known:
            digest = hashlib.sha256(self.documents.digest().encode())
            digest.update(digest_of(self.queries).encode())
            digest.update(repr((self.query_ids, [sorted(g.items()) for g in self.gains], self.protect)).encode())
            self._known["fingerprint"] = digest.hexdigest()
        found: str = self._known["fingerprint"]
        return found

    def chance(self) -> float:
        """Mean nDCG@10 of documents in random order."""
        count = len(self.documents)
        found = np.array([[sum(of.values()) / count] * min(NEAR, count) for of in self.gains], float)
        return float(gained(found, self._relevant(), NEAR).mean())

    def asked(self, store: VectorStore) -> dict[str, Tensor]:
        """Per query: nDCG@10 as `scores`, MRR@10, recall@100, and the numbers of the first ten documents."""
        hits = store.search(self.queries, DEEP)
        found, relevant = self._gains(hits)
        place = {name: i for i, name in enumerate(self.ids)}
        first = [[place[name] for name in row[:NEAR]] for row in hits.ids]
        return {
            "scores": torch.from_numpy(gained(found, relevant, NEAR)),
            "mrr": torch.from_numpy(first_found(found, NEAR)),
            "recall": torch.from_numpy(found_share(found, relevant, DEEP)),
            "first": torch.tensor(first, dtype=torch.long),
        }

    def milliseconds(self, store: VectorStore) -> float:
        """CPU time of one query, on one thread: the median of some, asked one by one, each at its quickest."""
        with one_thread():
            return statistics.median(
                min(_milliseconds(lambda one=one: store.search(one, NEAR)) for _ in range(TRIES))  # type: ignore[misc]
                for one in (self.queries.select(torch.tensor([n])) for n in range(min(TIMED, len(self.queries))))
            )

    def _gains(self, hits: Hits) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of what was found, in its order, and of all that is relevant."""
        found = np.array([[of.get(n, 0.0) for n in row] for row, of in zip(hits.ids, self.gains, strict=True)], float)
        return found, self._relevant()

    def _relevant(self) -> NDArray[np.float64]:
        most = max(len(of) for of in self.gains)
        return np.array([[*of.values(), *[0.0] * (most - len(of))] for of in self.gains], float)


def jaccard(first: Tensor, second: Tensor) -> float:
    """Mean over the queries of how much two lists of documents have in common: `|A and B| / |A or B|`.

    >>> jaccard(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 2], [3, 2]])).__round__(3)
    0.667
    """
    shares = []
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        both = set(a) | set(b)
        shares.append(len(set(a) & set(b)) / len(both) if both else 1.0)
    return sum(shares) / max(len(shares), 1)


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1000 * (time.process_time() - start)


def named_gains(ids: Sequence[str], gains: Sequence[Mapping[int, float]]) -> tuple[dict[str, float], ...]:
    """Gains by names of documents, of those by their numbers."""
    return tuple({ids[n]: g for n, g in of.items()} for of in gains)
