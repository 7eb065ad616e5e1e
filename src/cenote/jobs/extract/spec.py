"""What a worker must know: which model, which store, and the items of one shard. All of it can be pickled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cenote.features.raw import Item, RawItems
from cenote.features.store import Manifest
from cenote.models import Backbone, load


@dataclass(frozen=True)
class ModelSpec:
    """The arguments of `cenote.models.load`, so that any machine can load the model."""

    name: str
    kind: str | None = None
    revision: str | None = None
    device: str = "cpu"
    precision: str = "float32"
    max_length: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    def load(self) -> Backbone:
        """The model."""
        return load(
            self.name,
            self.kind,
            revision=self.revision,
            device=self.device,
            precision=self.precision,
            max_length=self.max_length,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )


@dataclass(frozen=True)
class Job:
    """One extraction.

    Attributes:
        store: the folder; every worker must see it under this path.
        model: how to load it.
        manifest: what the store is to hold; a worker whose model has other weights refuses to work.
        skip_bad: leave unreadable items out instead of stopping.
    """

    store: Path
    model: ModelSpec
    manifest: Manifest
    skip_bad: bool = False


@dataclass(frozen=True)
class Shard:
    """A fixed range of the items. Whoever computes it, the same file comes out."""

    number: int
    items: Sequence[Item]


def shards(items: RawItems, manifest: Manifest, without: set[int]) -> Iterator[Shard]:
    """The shards of the items in order, those in `without` left out."""
    size = manifest.items_per_shard
    for number in range(manifest.shard_count):
        if number not in without:
            yield Shard(number, items.items[number * size : (number + 1) * size])
