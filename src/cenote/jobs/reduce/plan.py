"""What a comparison would take, from a timed sample."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import torch

from cenote.features.corpora import Corpus, Texts
from cenote.jobs.reduce.encoding import Encoder
from cenote.jobs.reduce.job import Asked, compare_corpus

SAMPLE = 32


@dataclass(frozen=True)
class PlannedIndex:
    """One index, and what it would hold."""

    name: str
    vectors: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What would be compared.

    Attributes:
        arms: the indexes.
        seconds: that all would take on this machine.
        encoding: of these, the model's.
        disk: bytes that are taken meanwhile.
        sampled: documents that were timed.
    """

    arms: tuple[PlannedIndex, ...]
    seconds: float
    encoding: float
    disk: int
    sampled: int


def planned(corpus: Corpus, encoder: Encoder, asked: Asked) -> Plan:
    """The whole job on some documents, spread over the collection, and what follows for all of them.

    Queries are asked of the sample as they would be of the collection, so that the time of searching grows with it.
    """
    count = len(corpus.documents.ids)
    rows = torch.linspace(0, count - 1, min(SAMPLE, count)).round().long().tolist()
    place = {row: i for i, row in enumerate(rows)}
    some = Texts(tuple(corpus.documents.ids[r] for r in rows), tuple(corpus.documents.texts[r] for r in rows))
    # which answers are in the sample does not matter: it is timed, not judged
    gains = tuple({place[d]: g for d, g in of.items() if d in place} or {0: 1.0} for of in corpus.gains)
    start = time.perf_counter()
    encoder.documents(some.texts)
    encoding = (time.perf_counter() - start) * count / len(rows)
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = compare_corpus(replace(corpus, documents=some, gains=gains), encoder, asked, out=folder)
        measuring = (time.perf_counter() - start) * count / len(rows)
    width = 2 * encoder.width
    arms = tuple(
        PlannedIndex(r.method, round(r.vectors * count / len(rows)), round(r.vectors * width * count / len(rows)))
        for r in found.results
    )
    # the indexes of one method at a time, beside that of all vectors
    disk = sum(sorted((arm.bytes for arm in arms), reverse=True)[: 2 * len(asked.factors) + 1])
    return Plan(arms, encoding + max(measuring - encoding, 0.0), encoding, disk, len(rows))
