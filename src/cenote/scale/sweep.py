"""Arms of one comparison on a Ray cluster: one arm a task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from cenote.compare.arms import Arm, OnShare
from cenote.compare.cells import Cell
from cenote.compare.processes import timed
from cenote.core.libraries import everything, require
from cenote.scale.cluster import ATTEMPTS, answer, connect, room

TELL_SECONDS = LOOK_SECONDS = 0.5
"""Between two messages of a trial, and between two looks for them."""


class RaySweep:
    """Measures the arms of a comparison on a cluster: `cenote.jobs.probe.compare(..., engine=RaySweep())`.

    A trial gives the same cell wherever it is trained, on machines that round alike; the machine that asked for the comparison
    keeps the cells, resumes from them, and measures latencies itself. Tokens in a feature store are read where the trial
    runs, so every machine must see the store under the same path; tokens in memory travel once to each node.

    Args:
        address: of the cluster; `"auto"`: the one that this machine belongs to.
        workers: how many trials at once; default: as many as the cluster has CPUs for.
        cpus: CPUs of a trial, and its threads.

    Raises:
        InputError: where ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str = "auto", workers: int | None = None, cpus: int = 1) -> None:
        self.ray = connect(address)
        self.workers = workers
        self.cpus = cpus

    def __call__(self, trials: Sequence[Arm], on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
        """Cells as they finish."""
        if not trials:
            return
        ray = self.ray
        # one object: trials share their data
        shared = [ray.put([trial.travelling() for trial in trials])]
        board = ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
        task = ray.remote(_task()).options(num_cpus=self.cpus, max_retries=ATTEMPTS - 1)
        todo = iter(range(len(trials)))
        running: dict[Any, int] = {}
        asked: list[Any] = []
        libraries = everything()

        def give(count: int) -> None:
            for number in islice(todo, count):
                running[task.remote(shared, number, self.cpus, libraries, board)] = number

        def look() -> None:
            """Say what has come to be known since the last look; nobody waits for the board, and it may be gone."""
            if asked and ray.wait(asked, timeout=0)[0]:
                try:
                    news = ray.get(asked.pop())
                except ray.exceptions.RayError:
                    return
                for number in sorted(set(news) & set(running.values())):
                    on_share(trials[number].name, news[number])
            if not asked:
                asked.append(board.news.remote())

        give(self.workers or room(ray, self.cpus))
        try:
            while running:
                done, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)
                look()
                for reference in done:
                    trial = trials[running.pop(reference)]
                    cell = answer(ray, reference, f"trial {trial.name}")
                    give(1)
                    yield trial, cell
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            ray.kill(board)


class _Board:
    """What trials tell of how far they are, for the one who waits for them."""

    def __init__(self) -> None:
        self.shares: dict[int, float] = {}

    def tell(self, number: int, share: float) -> None:
        """That so much of a trial is done."""
        self.shares[number] = share

    def news(self) -> dict[int, float]:
        """What was told since this was last asked."""
        news, self.shares = self.shares, {}
        return news


def _task() -> Callable[..., Cell]:
    """`_computed`, found in `cenote` where it runs: where that is missing, it is an error of the task, which tells more."""

    def compute(*arguments: Any) -> Cell:
        from cenote.scale.sweep import _computed

        return _computed(*arguments)

    return compute


def _computed(shared: Sequence[Any], number: int, threads: int, libraries: Mapping[str, str], board: Any) -> Cell:
    """One trial, where it is given to."""
    import ray
    import torch

    require(libraries)
    torch.set_num_threads(threads)
    trials: Sequence[Arm] = ray.get(shared[0])
    last = time.monotonic()

    def tell(_name: str, share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_SECONDS:
            last = time.monotonic()
            board.tell.remote(number, share)

    return timed(trials[number], tell)
