"""Extraction on a Ray cluster: actors that hold the model, a shard a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cenote.features.store import ShardEntry
from cenote.scale.cluster import connect, room, spread
from cenote.scale.engine import OnShard
from cenote.scale.job import Job, Shard
from cenote.scale.libraries import everything, require
from cenote.scale.work import OnItems, Worker


class RayEngine:
    """Actors on a cluster compute the shards, and write them to a folder that all machines see.

    An actor that dies, alone or with its node, is replaced, and its shards are given out again; a shard that brought down
    its actor several times ends the run. Shards are small, and come from a reader that is asked for more only as actors
    become free, so the driver's memory does not grow with their number.

    Args:
        address: of the cluster; `"auto"`: the one that this machine belongs to.
        workers: how many actors; default: one a GPU where the job computes on cuda, else one for every `cpus` CPUs.
        cpus: CPUs of an actor, and its threads.

    Raises:
        InputError: where ray is not installed, or there is no cluster.

    Note:
        Plain tasks of actors, not `ray.data`: its blocks carry the tokens to the tasks that write them, where here nothing
        but the names of the items and the checksum of a written shard has to travel, and a run that was killed begins again.
        `benchmarks/ray_data.py` compares the two.
    """

    def __init__(self, address: str = "auto", workers: int | None = None, cpus: int = 1) -> None:
        self.ray = connect(address)
        self.workers = workers
        self.cpus = cpus

    def run(self, job: Job, todo: Iterable[Shard], on_shard: OnShard, on_items: OnItems) -> None:
        """See `cenote.scale.Engine.run`."""
        on_gpu = job.model.device.startswith("cuda")
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": 1 if on_gpu else 0, "max_restarts": 0}
        remote = self.ray.remote(_Actor)
        job_reference = self.ray.put(job)
        done = spread(
            self.ray,
            lambda: remote.options(**options).remote(job_reference, self.cpus, everything()),
            iter(todo),
            lambda shard: f"shard {shard.number}",
            self.workers or room(self.ray, self.cpus, on_gpu),
        )
        for _, entry in done:
            on_shard(entry)
            on_items(entry.rows + entry.skipped)


class _Actor:
    """Lives on a node of the cluster, and holds the model."""

    def __init__(self, job: Job, threads: int, libraries: Mapping[str, str]) -> None:
        import torch

        torch.set_num_threads(threads)
        self.job = job
        self.libraries = libraries
        self.worker: Worker | None = None

    def ready(self) -> None:
        """That it stands, and has the same libraries."""
        require(self.libraries)

    def compute(self, shard: Shard) -> ShardEntry:
        """One shard; the model is loaded with the first, so that what is wrong with it is told as an answer."""
        self.worker = self.worker or Worker(self.job)
        return self.worker(shard)
