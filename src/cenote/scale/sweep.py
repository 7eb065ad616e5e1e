"""Probes of one comparison on a Ray cluster: one trial a task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cenote.probe.cells import Cell
from cenote.probe.trials import OnShare, Trial, without_pictures
from cenote.scale.cluster import connect, room, spread
from cenote.scale.libraries import everything, require

TELL_SECONDS = 0.5
"""Between two messages of a trial."""


class RaySweep:
    """Trains the columns of a comparison on a cluster: `cenote.probe.compare(..., engine=RaySweep())`.

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

    def __call__(self, trials: Sequence[Trial], on_share: OnShare) -> Iterator[tuple[Trial, Cell]]:
        """Cells as they finish."""
        if not trials:
            return
        remote = self.ray.remote(_Prober)
        # one object: trials share their data
        reference = self.ray.put([without_pictures(trial) for trial in trials])
        board = self.ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
        finished: set[int] = set()
        asked: list[Any] = []

        def look() -> None:
            """Say what has come to be known since the last look; nobody waits for the board, and it may be gone."""
            if asked and self.ray.wait(asked, timeout=0)[0]:
                try:
                    news = self.ray.get(asked.pop())
                except self.ray.exceptions.RayError:
                    return
                for number in sorted(set(news) - finished):
                    on_share(trials[number].name, news[number])
            if not asked:
                asked.append(board.news.remote())

        done: Iterator[tuple[int, Any]] = spread(
            self.ray,
            lambda: remote.options(num_cpus=self.cpus, max_restarts=0).remote(
                reference, self.cpus, everything(), board
            ),
            iter(range(len(trials))),
            lambda number: f"trial {trials[number].name}",
            min(self.workers or room(self.ray, self.cpus), len(trials)),
            meanwhile=look,
        )
        try:
            for number, cell in done:
                finished.add(number)
                yield trials[number], cell
        finally:
            self.ray.kill(board)


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


class _Prober:
    """Lives on a node of the cluster, and holds the data."""

    def __init__(self, trials: Sequence[Trial], threads: int, libraries: Mapping[str, str], board: Any) -> None:
        import torch

        torch.set_num_threads(threads)
        self.trials = trials
        self.libraries = libraries
        self.board = board

    def ready(self) -> None:
        """That it stands, and has the same libraries."""
        require(self.libraries)

    def compute(self, number: int) -> Cell:
        """One trial."""
        return self.trials[number].run(self._told(number))

    def _told(self, number: int) -> Callable[[str, float], None]:
        last = time.monotonic()

        def tell(_name: str, share: float) -> None:
            nonlocal last
            if time.monotonic() - last >= TELL_SECONDS:
                last = time.monotonic()
                self.board.tell.remote(number, share)

        return tell
