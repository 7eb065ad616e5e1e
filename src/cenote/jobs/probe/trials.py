"""Train the columns of a comparison: one after the other, or several at once in processes of their own."""

from __future__ import annotations

import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.jobs.probe import cost, training
from cenote.jobs.probe.arms import Column
from cenote.jobs.probe.cells import Cell
from cenote.jobs.probe.metrics import METRICS
from cenote.jobs.probe.module import build_probe
from cenote.jobs.probe.recipe import Recipe

OnShare = Callable[[str, float], None]
"""Called with a trial's name and the share of its work that is done."""

LOOK_SECONDS = 0.2
"""Between two looks at how far the processes are."""

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # mapped pages of the data are no leak, for which loky would start a process anew
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18",
    # each step frees what the next one asks for: glibc keeps it, instead of fetching the same pages from the system again
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class Trial:
    """One column to train, and how: everything that its cell follows from.

    Attributes:
        column: what is trained, on which view of the data.
        metric: decides on validation.
        seeds: of the initialisations.
        recipe: of the training.
    """

    column: Column
    metric: str
    seeds: tuple[int, ...]
    recipe: Recipe

    @property
    def name(self) -> str:
        """That of the column."""
        return self.column.name

    def work(self) -> int:
        """Multiply-adds for one item, by which trials can be ordered."""
        return cost.multiply_adds(build_probe(self.column.method.name, self.column.data), self.column.data)

    def run(self, on_share: OnShare = lambda _name, _share: None) -> Cell:
        """The trained cell; `timed` adds what can only be measured when nothing else runs."""
        method, data = self.column.method, self.column.data
        trained = training.train(
            lambda: build_probe(method.name, data),
            data,
            METRICS[self.metric],
            self.seeds,
            self.recipe,
            lambda share: on_share(self.name, 0.95 * share),
        )
        test = data.indices("test")
        scores = torch.stack([training.predict(p, data, test, self.recipe.tokens_at_once) for p in trained.probes])
        probe = trained.probes[0]
        record = {
            "settings": dict(method.settings or {}),
            "validation_per_seed": trained.validation,
            "learning_rate": trained.learning_rate,
            "epochs": trained.epochs,
            "parameters": cost.parameters(probe),
            "multiply_adds": cost.multiply_adds(probe, data),
            "seconds": trained.seconds,
            "train_loss": trained.train_loss,
            "validation_curve": trained.validation_curve,
        }
        return Cell(self.name, record, scores, tuple(p.state_dict() for p in trained.probes))


def timed(cell: Cell, column: Column) -> Cell:
    """The same cell with the latency of its probe."""
    probe = cell.probe(lambda: build_probe(column.method.name, column.data), 0)
    return replace(cell, record={**cell.record, "latency_ms": cost.latency_ms(probe, column.data)})


def run_in_turn(trials: Sequence[Trial], on_share: OnShare) -> Iterator[tuple[Trial, Cell]]:
    """One after the other, in this process."""
    for trial in trials:
        yield trial, timed(trial.run(on_share), trial.column)


def run_in_processes(trials: Sequence[Trial], workers: int, on_share: OnShare) -> Iterator[tuple[Trial, Cell]]:
    """`workers` at a time, each on one thread, as they finish; their cells are not `timed` yet.

    The data are written to a temporary file once, which all processes map. What cannot be written, or whose process dies
    (of memory, as a rule), is trained here instead.
    """
    from loky import ProcessPoolExecutor
    from loky.process_executor import BrokenProcessPool

    # a long one that starts last would end alone
    trials = sorted(trials, key=Trial.work, reverse=True)
    left = {trial.name: trial for trial in trials}
    with tempfile.TemporaryDirectory(prefix="cenote-") as folder:
        file, shares_file = Path(folder) / "trials.pt", Path(folder) / "shares"
        try:
            torch.save([without_pictures(trial) for trial in trials], file)
            # written, not only sized: a process that first touches a mapped page of a full disk would die of it
            shares_file.write_bytes(bytes(8 * len(trials)))
        except OSError as error:
            warnings.warn(f"training one at a time: {folder} cannot hold the data ({error.strerror})", stacklevel=2)
            yield from run_in_turn(trials, on_share)
            return
        pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(file, shares_file), env=WORKER_ENVIRONMENT)
        finished = False
        try:
            shares = _mapped(shares_file)
            told = shares.copy()
            futures = {pool.submit(_run, number): trial for number, trial in enumerate(trials)}
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                for future in done:
                    trial = futures[future]
                    cell = future.result()
                    del left[trial.name]
                    yield trial, cell
                now = shares.copy()
                for number in np.flatnonzero(now != told).tolist():
                    if trials[number].name in left:
                        on_share(trials[number].name, float(now[number]))
                told = now
            finished = True
        except BrokenProcessPool:
            warnings.warn("a training process died, perhaps of too little memory; going on one at a time", stacklevel=2)
        finally:
            pool.shutdown(wait=finished, kill_workers=not finished)
    yield from run_in_turn(list(left.values()), on_share)


def processors() -> int:
    """How many processes may compute at once: the threads that torch was given, on processors that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def without_pictures(trial: Trial) -> Trial:
    """The same, without what only reports need: it need not travel to where the trial is trained."""
    return replace(trial, column=replace(trial.column, data=replace(trial.column.data, images=None, words=None)))


def _mapped(file: Path) -> NDArray[np.float64]:
    """The share of each trial, written by the process that trains it."""
    return np.memmap(file, np.float64, "r+")


_trials: list[Trial] = []
_shares: list[NDArray[np.float64]] = []


def _start(file: Path, shares_file: Path) -> None:
    # Ctrl-C reaches the whole group; the first process decides what becomes of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # written by this program a moment ago
    _trials[:] = torch.load(file, mmap=True, weights_only=False)
    _shares[:] = [_mapped(shares_file)]


def _run(number: int) -> Cell:
    def tell(_name: str, share: float) -> None:
        _shares[0][number] = share

    return _trials[number].run(tell)
