"""Extraction on a Ray cluster: actors that hold the model, a shard a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cenote.core import InputError
from cenote.features.store import ShardEntry
from cenote.scale.engine import OnShard
from cenote.scale.job import Job, Shard
from cenote.scale.work import OnItems, Worker

ATTEMPTS = 5
AHEAD = 2
"""Shards that wait at each actor, so that it never waits for the driver."""


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
        Plain tasks of actors, not `ray.data`: its blocks carry rows between machines, where here nothing but the names of
        the items and the checksum of a written shard has to travel, and its retries could not tell a shard that is already
        on disk.
    """

    def __init__(self, address: str = "auto", workers: int | None = None, cpus: int = 1) -> None:
        self.ray = _ray()
        if not self.ray.is_initialized():
            try:
                self.ray.init(address=address, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"address: no Ray cluster at {address!r} ({str(error).splitlines()[0]}); start one with ray start --head"
                ) from error
        self.workers = workers
        self.cpus = cpus

    def run(self, job: Job, todo: Iterable[Shard], on_shard: OnShard, on_items: OnItems) -> None:
        """See `cenote.scale.Engine.run`."""

        def done(entry: ShardEntry) -> None:
            on_shard(entry)
            on_items(entry.rows + entry.skipped)

        on_gpu = job.model.device.startswith("cuda")
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": 1 if on_gpu else 0, "max_restarts": 0}
        remote = self.ray.remote(_Actor)
        job_reference = self.ray.put(job)
        spread(
            self.ray,
            lambda: remote.options(**options).remote(job_reference, self.cpus),
            iter(todo),
            done,
            workers=self.workers or self._free(on_gpu),
        )

    def _free(self, on_gpu: bool) -> int:
        held = self.ray.cluster_resources()
        return max(1, int(held.get("GPU", 0)) if on_gpu else int(held.get("CPU", 1)) // self.cpus)


def spread(
    ray: Any,
    make: Callable[[], Any],
    todo: Iterator[Shard],
    on_done: Callable[[ShardEntry], None],
    workers: int,
    attempts: int = ATTEMPTS,
) -> None:
    """Give shards to actors until all are done; what a dead actor held is given to others.

    Args:
        ray: the module.
        make: a new actor, with a method `compute(shard)`.
        todo: the shards.
        on_done: called with what `compute` gave.
        workers: how many actors.
        attempts: how often a shard may bring down its actor.

    Raises:
        InputError: as a worker raised it, or where a shard was tried too often.
    """
    from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayActorError, RayTaskError

    lost = (ActorDiedError, ActorUnavailableError, NodeDiedError, RayActorError)
    again: list[Shard] = []
    tries: dict[int, int] = {}
    running: dict[Any, tuple[Any, Shard]] = {}
    actors: list[Any] = []
    load: dict[Any, int] = {}

    def following() -> Shard | None:
        return again.pop() if again else next(todo, None)

    def give(actor: Any) -> bool:
        shard = following()
        if shard is None:
            return False
        running[actor.compute.remote(shard)] = actor, shard
        load[actor] += 1
        return True

    def hire() -> None:
        actor = make()
        actors.append(actor)
        load[actor] = 0

    for _ in range(workers):
        hire()
    try:
        busy = True
        while busy or running:
            for actor in actors:
                while load[actor] < AHEAD and give(actor):
                    pass
            busy = False
            if not running:
                break
            (reference,), _ = ray.wait(list(running), num_returns=1)
            actor, shard = running.pop(reference)
            if actor in load:
                load[actor] -= 1
            try:
                on_done(ray.get(reference))
            except RayTaskError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, InputError):
                    raise InputError(str(cause)) from error
                raise
            except lost as error:
                tries[shard.number] = tries.get(shard.number, 0) + 1
                if tries[shard.number] >= attempts:
                    raise InputError(
                        f"shard {shard.number} was lost with its worker {attempts} times ({str(error).splitlines()[0]}); "
                        f"finished shards are kept: look at the workers' logs, and run the same command again"
                    ) from error
                again.append(shard)
                if actor in load:
                    actors.remove(actor)
                    del load[actor]
                    hire()
            busy = True
    finally:
        for actor in actors:
            ray.kill(actor)


class _Actor:
    """Lives on a node of the cluster, and holds the model."""

    def __init__(self, job: Job, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.job = job
        self.worker: Worker | None = None

    def compute(self, shard: Shard) -> ShardEntry:
        """One shard; the model is loaded with the first, so that what is wrong with it is told as an answer."""
        self.worker = self.worker or Worker(self.job)
        return self.worker(shard)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("engine: ray needs the package ray; pip install 'cenote[ray]'") from error
    return ray
