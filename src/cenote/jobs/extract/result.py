"""What comes out of an extraction, before, meanwhile and after."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cenote.features.store import Manifest


@dataclass(frozen=True)
class Estimate:
    """What an extraction will take, from a timed sample.

    `tokens` and `bytes` are those of the whole store, `seconds` the time of this machine, `sampled` how many items were timed.
    """

    items: int
    tokens: int
    bytes: int
    seconds: float
    sampled: int
    shards: int
    free_bytes: int


@dataclass(frozen=True)
class Extracted:
    """What an extraction did.

    Attributes:
        store: the folder.
        manifest: complete.
        computed, kept: numbers of shards.
        remade: names of damaged shards that were made anew.
        skipped: unreadable items that were left out, and why.
        seconds: wall time.
    """

    store: Path
    manifest: Manifest
    computed: int
    kept: int
    remade: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far it is: items done (kept ones included), all items, items computed by this call and the seconds that took."""

    done: int
    items: int
    computed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Items per second, of this call."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float:
        """Seconds that the rest will take at this rate."""
        return (self.items - self.done) / self.rate if self.rate else math.inf


OnProgress = Callable[[Progress], None]
