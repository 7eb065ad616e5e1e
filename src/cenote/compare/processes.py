"""Measure the arms of a comparison: one after the other, or several at once in processes of their own."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.compare.arms import Arm, OnShare
from cenote.compare.cells import Cell

LOOK_SECONDS = 0.2
"""Between two looks at how far the processes are."""

REMEDY = "let Arm.travelling() leave out what cannot go to another process, or ask for one worker"

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # mapped pages of the data are no leak, for which loky would start a process anew
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18",
    # each step frees what the next one asks for: glibc keeps it, instead of fetching the same pages from the system again
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Unreadable(Exception):
    """A process could not read the arms that were written for it."""


def timed(arm: Arm, on_share: OnShare) -> Cell:
    """The arm's cell, with the seconds that it took where the arm does not say so itself."""
    start = time.perf_counter()
    cell = arm.run(on_share)
    return cell if "seconds" in cell.record else cell.with_record(seconds=time.perf_counter() - start)


def run_in_turn(arms: Sequence[Arm], on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
    """One after the other, in this process."""
    for arm in arms:
        yield arm, arm.finish(timed(arm, on_share))


def run_in_processes(arms: Sequence[Arm], workers: int, on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
    """`workers` at a time, each on one thread, as they finish; their cells are not `finish`ed yet.

    The data are written to a temporary file once, which all processes map. Arms of a script or a notebook, which the processes
    cannot import, travel with their code. What cannot be written or read, or whose process dies (of memory, as a rule), is
    measured here instead.
    """
    import cloudpickle
    from loky import ProcessPoolExecutor
    from loky.process_executor import BrokenProcessPool

    # a long one that starts last would end alone
    arms = sorted(arms, key=lambda arm: arm.work(), reverse=True)
    left = {arm.name: arm for arm in arms}
    with tempfile.TemporaryDirectory(prefix="cenote-") as folder:
        file, shares_file = Path(folder) / "arms.pt", Path(folder) / "shares"
        try:
            torch.save([arm.travelling() for arm in arms], file, pickle_module=cloudpickle)
            # written, not only sized: a process that first touches a mapped page of a full disk would die of it
            shares_file.write_bytes(bytes(8 * len(arms)))
        except OSError as error:
            warnings.warn(f"measuring one at a time: {folder} cannot hold the data ({error.strerror})", stacklevel=2)
            yield from run_in_turn(arms, on_share)
            return
        except Exception as error:  # whatever an arm holds says so in its own way
            warnings.warn(
                f"measuring one at a time: the arms cannot be pickled ({_said(error)}); {REMEDY}", stacklevel=2
            )
            yield from run_in_turn(arms, on_share)
            return
        pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(file, shares_file), env=WORKER_ENVIRONMENT)
        finished = False
        try:
            shares = _mapped(shares_file)
            told = shares.copy()
            futures = {pool.submit(_run, number): arm for number, arm in enumerate(arms)}
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                for future in done:
                    arm = futures[future]
                    cell = future.result()
                    del left[arm.name]
                    yield arm, cell
                now = shares.copy()
                for number in np.flatnonzero(now != told).tolist():
                    if arms[number].name in left:
                        on_share(arms[number].name, float(now[number]))
                told = now
            finished = True
        except Unreadable as error:
            warnings.warn(f"measuring one at a time: processes cannot read the arms ({error}); {REMEDY}", stacklevel=2)
        except BrokenProcessPool:
            warnings.warn("a process died, perhaps of too little memory; going on one at a time", stacklevel=2)
        finally:
            pool.shutdown(wait=finished, kill_workers=not finished)
    yield from run_in_turn(list(left.values()), on_share)


def processors() -> int:
    """How many processes may compute at once: the threads that torch was given, on processors that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def _mapped(file: Path) -> NDArray[np.float64]:
    """The share of each arm, written by the process that measures it."""
    return np.memmap(file, np.float64, "r+")


def _said(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_arms: list[Arm] = []
_shares: list[NDArray[np.float64]] = []
_failures: list[str] = []


def _start(file: Path, shares_file: Path) -> None:
    # Ctrl-C reaches the whole group; the first process decides what becomes of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        # written by this program a moment ago
        _arms[:] = torch.load(file, mmap=True, weights_only=False)
    except Exception as error:  # a process that dies here could not say why
        _failures.append(_said(error))
    _shares[:] = [_mapped(shares_file)]


def _run(number: int) -> Cell:
    if _failures:
        raise Unreadable(_failures[0])

    def tell(_name: str, share: float) -> None:
        _shares[0][number] = share

    return timed(_arms[number], tell)
