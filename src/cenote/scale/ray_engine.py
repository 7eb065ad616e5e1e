"""Extraction on a Ray cluster: actors that hold the model, a shard a task."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cenote.core import InputError
from cenote.features.store import ShardEntry
from cenote.scale.engine import OnShard
from cenote.scale.job import Job, Shard
from cenote.scale.work import OnItems, Worker

ATTEMPTS = 5
CONNECT_SECONDS = 10
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
            _reachable(address)
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
        make: a new actor, with methods `ready()` and `compute(shard)`.
        todo: the shards.
        on_done: called with what `compute` gave.
        workers: how many actors.
        attempts: how often a shard may be lost, and how often in a row a new actor may die before it is ready.

    Raises:
        InputError: as a worker raised it, or where a shard, or a new actor, was lost too often.
    """
    from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

    again: list[Shard] = []
    lost: dict[int, int] = {}
    stillborn = 0
    # an actor gets shards when it stands: one that waits for room on a smaller cluster must not hold any
    coming: dict[Any, Any] = {}
    load: dict[Any, int] = {}
    running: dict[Any, tuple[Any, Shard]] = {}

    def hire() -> None:
        actor = make()
        coming[actor.ready.remote()] = actor

    def give(actor: Any) -> bool:
        shard = again.pop() if again else next(todo, None)
        if shard is not None:
            running[actor.compute.remote(shard)] = actor, shard
            load[actor] += 1
        return shard is not None

    for _ in range(workers):
        hire()
    first = next(todo, None)
    again += [] if first is None else [first]
    try:
        while again or running:
            (reference, *_), _ = ray.wait([*running, *coming], num_returns=1)
            if reference in coming:
                actor = coming.pop(reference)
                try:
                    ray.get(reference)
                    load[actor], stillborn = 0, 0
                except (RayActorError, ActorUnavailableError) as error:
                    stillborn += 1
                    if stillborn >= attempts:
                        raise InputError(f"engine: no worker can be started ({_line(error)})") from error
                    hire()
            else:
                actor, shard = running.pop(reference)
                if actor in load:
                    load[actor] -= 1
                try:
                    on_done(ray.get(reference))
                except RayTaskError as error:
                    if isinstance(error.cause, InputError):
                        raise InputError(str(error.cause)) from error
                    raise
                except (RayActorError, ActorUnavailableError) as error:
                    lost[shard.number] = lost.get(shard.number, 0) + 1
                    if lost[shard.number] >= attempts:
                        raise InputError(
                            f"shard {shard.number} was lost with its worker {attempts} times ({_line(error)}); finished "
                            f"shards are kept: look at the workers' logs, and run the same command again"
                        ) from error
                    again.append(shard)
                    # all that it held fails, one by one; it is replaced once
                    if load.pop(actor, None) is not None:
                        hire()
            for actor in load:
                while load[actor] < AHEAD and give(actor):
                    pass
    finally:
        for actor in [*load, *coming.values()]:
            ray.kill(actor)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Actor:
    """Lives on a node of the cluster, and holds the model."""

    def __init__(self, job: Job, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.job = job
        self.worker: Worker | None = None

    def ready(self) -> bool:
        """That it stands."""
        return True

    def compute(self, shard: Shard) -> ShardEntry:
        """One shard; the model is loaded with the first, so that what is wrong with it is told as an answer."""
        self.worker = self.worker or Worker(self.job)
        return self.worker(shard)


def _reachable(address: str) -> None:
    """Ray itself waits for minutes where nobody listens."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"address: no Ray cluster at {address!r} ({error.strerror or error}); start one with ray start --head"
        ) from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("engine: ray needs the package ray; pip install 'cenote[ray]'") from error
    return ray
