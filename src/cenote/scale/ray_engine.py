"""Extraction on a Ray cluster: `ray.data` gives out the shards to a pool of actors that hold the model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from cenote.core import InputError
from cenote.core.libraries import everything, require
from cenote.features.store import ShardEntry
from cenote.jobs.extract.engine import OnShard
from cenote.jobs.extract.spec import Job, Shard
from cenote.jobs.extract.work import OnItems, Worker
from cenote.scale.cluster import ATTEMPTS, connect, reason, room

AHEAD = 2
"""Shards that wait at each actor, so that it never waits for the driver."""


class RayEngine:
    """Actors on a cluster compute the shards, and write them to a folder that all machines see.

    An actor that dies, alone or with its node, is replaced, and its shards are given out again; a shard that brought down
    its actor several times ends the run.

    Args:
        address: of the cluster; `"auto"`: the one that this machine belongs to.
        workers: how many actors; default: one a GPU where the job computes on cuda, else one for every `cpus` CPUs.
        cpus: CPUs of an actor, and its threads.

    Raises:
        InputError: where `ray[data]` is not installed, or there is no cluster.

    Note:
        A row of the dataset is a shard, not an item: nothing but the names of the items and the checksum of a written shard
        travels, the files are the same whoever writes them, and a run that was killed goes on with the shards that are
        missing. `benchmarks/ray_data.py` compares it with rows that are items.
    """

    def __init__(self, address: str = "auto", workers: int | None = None, cpus: int = 1) -> None:
        self.ray = connect(address)
        self.data = _ray_data()
        self.workers = workers
        self.cpus = cpus

    def run(self, job: Job, todo: Iterable[Shard], on_shard: OnShard, on_items: OnItems) -> None:
        """See `cenote.jobs.extract.Engine.run`."""
        rows = [{"shard": self.ray.cloudpickle.dumps(shard)} for shard in todo]
        if not rows:
            return
        on_gpu = job.model.device.startswith("cuda")
        workers = min(self.workers or room(self.ray, self.cpus, on_gpu), len(rows))
        attempts = self.ray.remote(_Attempts).options(num_cpus=0, max_restarts=-1).remote()
        written = self.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Computing,
            fn_constructor_args=(job, self.cpus, everything(), attempts),
            # what is left of a pool must shrink, so that an actor whose node died finds room on another
            compute=self.data.ActorPoolStrategy(
                min_size=1, initial_size=workers, max_size=workers, max_tasks_in_flight_per_actor=AHEAD
            ),
            num_cpus=self.cpus,
            num_gpus=1 if on_gpu else 0,
        )
        written.context.enable_progress_bars = False
        written.context.max_consecutive_actor_init_deaths = ATTEMPTS
        try:
            with _quiet():
                for row in written.iter_rows():
                    if row["error"]:
                        raise InputError(row["error"])
                    entry = ShardEntry(**{name: value for name, value in row.items() if name != "error"})
                    on_shard(entry)
                    on_items(entry.rows + entry.skipped)
        except self.ray.exceptions.RayActorError as error:
            raise InputError(f"engine: no worker can be started ({reason(error)})") from error
        finally:
            self.ray.kill(attempts)


class _Computing:
    """Lives on a node of the cluster, and holds the model."""

    def __init__(self, job: Job, threads: int, libraries: Mapping[str, str], attempts: Any) -> None:
        import torch

        torch.set_num_threads(threads)
        self.job = job
        self.libraries = libraries
        self.attempts = attempts
        self.worker: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One shard; what a person can mend is told as an answer, as `ray.data` wraps what is raised."""
        import ray

        try:
            shard: Shard = ray.cloudpickle.loads(row["shard"])
            self._require_few_attempts(shard)
            if self.worker is None:
                require(self.libraries)
                self.worker = Worker(self.job)
            return {"error": "", **asdict(self.worker(shard))}
        except InputError as error:
            return {"error": str(error), **asdict(ShardEntry("", "", 0, 0, 0, 0, 0))}

    def _require_few_attempts(self, shard: Shard) -> None:
        import ray

        try:
            begun = ray.get(self.attempts.begin.remote(shard.number))
        except ray.exceptions.RayError:
            # who counts was lost itself, and begins anew
            return
        if begun > ATTEMPTS:
            raise InputError(
                f"shard {shard.number} was lost with its worker {ATTEMPTS} times; what is finished is kept: look at the "
                f"workers' logs, and run the same command again"
            )


class _Attempts:
    """How often each shard was begun, wherever that was."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Once more: how often now."""
        self.begun[number] += 1
        return self.begun[number]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the messages of `ray.data`, which tell of its plans, and of errors that are raised as well."""
    logger = logging.getLogger("ray.data")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _ray_data() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise InputError(f"engine: ray needs ray[data] ({error}); pip install 'cenote[ray]'") from error
    return ray.data
