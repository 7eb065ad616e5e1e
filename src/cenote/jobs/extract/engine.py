"""Who computes which shard. What a shard holds is decided elsewhere, so every engine fills the same store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

from cenote.features.store import ShardEntry
from cenote.jobs.extract.spec import Job, Shard
from cenote.jobs.extract.work import OnItems, Worker
from cenote.models import Backbone

OnShard = Callable[[ShardEntry], None]
"""Called when a shard is written."""


@runtime_checkable
class Engine(Protocol):
    """Computes shards, anywhere and in any order.

    A shard may be computed twice, after a worker was lost: both times the same file comes out, under the same name. The store
    is complete when all its shards lie in the folder, whatever an engine believes.
    """

    def run(self, job: Job, todo: Iterable[Shard], on_shard: OnShard, on_items: OnItems) -> None:
        """Compute all of `todo`.

        Args:
            job: what to compute.
            todo: the shards that are missing; read as they are needed, for there may be millions.
            on_shard: called for each that is written.
            on_items: called with the number of items just computed, as often as the engine knows.

        Raises:
            InputError: that a worker raised; what other workers finished stays.
        """


class LocalEngine:
    """One worker in this process, which writes a shard while it computes the next one.

    Args:
        backbone: the model, if it is loaded already.
    """

    def __init__(self, backbone: Backbone | None = None) -> None:
        self.backbone = backbone

    def run(self, job: Job, todo: Iterable[Shard], on_shard: OnShard, on_items: OnItems) -> None:
        """Compute the shards one after the other."""
        worker: Worker | None = None
        writing: Future[ShardEntry] | None = None
        # whatever ends this early, the shard that is being written is finished first
        with ThreadPoolExecutor(1) as writer:
            for shard in todo:
                worker = worker or Worker(job, self.backbone)
                rows = worker.rows(shard.items, on_items)
                if writing is not None:
                    on_shard(writing.result())
                writing = writer.submit(worker.write, shard, rows)
            if writing is not None:
                on_shard(writing.result())
