"""Probes of one comparison on a Ray cluster: one trial a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cenote.probe.cells import Cell
from cenote.probe.trials import OnShare, Trial
from cenote.scale.cluster import connect, room, spread
from cenote.scale.libraries import everything, require


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
        del on_share  # what a trial has done of its work stays on its machine
        remote = self.ray.remote(_Prober)
        # one object: trials share their data
        reference = self.ray.put(list(trials))
        done: Iterator[tuple[int, Any]] = spread(
            self.ray,
            lambda: remote.options(num_cpus=self.cpus, max_restarts=0).remote(reference, self.cpus, everything()),
            iter(range(len(trials))),
            lambda number: f"trial {trials[number].name}",
            min(self.workers or room(self.ray, self.cpus), max(len(trials), 1)),
        )
        for number, cell in done:
            yield trials[number], cell


class _Prober:
    """Lives on a node of the cluster, and holds the data."""

    def __init__(self, trials: Sequence[Trial], threads: int, libraries: Mapping[str, str]) -> None:
        import torch

        torch.set_num_threads(threads)
        self.trials = trials
        self.libraries = libraries

    def ready(self) -> None:
        """That it stands, and has the same libraries."""
        require(self.libraries)

    def compute(self, number: int) -> Cell:
        """One trial."""
        return self.trials[number].run()
