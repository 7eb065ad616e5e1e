"""What indexing did."""

from __future__ import annotations

from dataclasses import dataclass

from cenote.features.vectors import Meta


@dataclass(frozen=True)
class Indexed:
    """A store after documents were added.

    Attributes:
        meta: what it holds.
        added: documents that were encoded, reduced and added.
        kept: that were there already.
        documents: in the store.
        bytes: that it takes on disk.
        before, after: vectors of what was added, before and after reduction.
        encoding, reducing, adding: seconds.
        trained: whether the store built an index of its own.
    """

    meta: Meta
    added: int
    kept: int
    documents: int
    bytes: int
    before: int
    after: int
    encoding: float
    reducing: float
    adding: float
    trained: bool = False
