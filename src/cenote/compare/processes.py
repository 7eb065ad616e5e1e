"""Measure the arms of a comparison: one after the other, or several at once in processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.compare.arms import Arm, OnShare
from cenote.compare.cells import Cell
from cenote.core.files import temporary_folder
from cenote.core.interrupts import ENDING
from cenote.core.seeded import seeded

LOOK_SECONDS = 0.2
"""Between two looks at how far the processes are, and, in these, at whether the first one lives."""

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


class Unsuited(Exception):
    """Why arms cannot be measured in processes of their own."""


def timed(arm: Arm, on_share: OnShare) -> Cell:
    """The arm's cell, with the seconds that it took where the arm does not say so itself.

    Where several threads compare, one of them measures at a time: they share torch's generator and its number of threads.
    """
    with seeded(0):
        start = time.perf_counter()
        cell = arm.run(on_share)
        return cell if "seconds" in cell.record else cell.with_record(seconds=time.perf_counter() - start)


def finished(arm: Arm, cell: Cell) -> Cell:
    """The cell with what only this process measures; one thread at a time."""
    with seeded(0):
        return arm.finish(cell)


def run_in_turn(arms: Sequence[Arm], on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
    """One after the other, in this process."""
    for arm in arms:
        yield arm, finished(arm, timed(arm, on_share))


def run_in_processes(arms: Sequence[Arm], workers: int, on_share: OnShare) -> Iterator[tuple[Arm, Cell]]:
    """`workers` at a time, each on one thread, as they finish; their cells are not `finish`ed yet.

    The data are written to a temporary file once, which all processes map. Arms of a script or a notebook, which the processes
    cannot import, travel with their code. What cannot be written or read, or whose process dies (of memory, as a rule), is
    measured here instead. Where this process dies, however it does, the others follow, and take the file along.
    """
    from loky.process_executor import BrokenProcessPool

    # a long one that starts last would end alone
    with seeded(0):
        arms = sorted(arms, key=lambda arm: arm.work(), reverse=True)
    left = {arm.name: arm for arm in arms}
    try:
        with ExitStack() as stack:
            futures, shares = _started(arms, workers, stack)
            told = shares.copy()
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
    except Unsuited as error:
        warnings.warn(f"measuring one at a time: {error}", stacklevel=2)
    except BrokenProcessPool:
        warnings.warn("a process died, perhaps of too little memory; going on one at a time", stacklevel=2)
    yield from run_in_turn(list(left.values()), on_share)


def _started(
    arms: Sequence[Arm], workers: int, stack: ExitStack
) -> tuple[dict[Future[Cell], Arm], NDArray[np.float64]]:
    """What processes are measuring, and how far they are; all that they need ends with the stack.

    Raises:
        Unsuited: where there is no room, or the arms cannot be written.
    """
    import cloudpickle

    try:
        folder = stack.enter_context(temporary_folder())
        file, shares_file = folder / "arms.pt", folder / "shares"
        # of a file that torch opens by itself, it does not say why it could not be written
        with file.open("wb") as opened:
            torch.save([arm.travelling() for arm in arms], opened, pickle_module=cloudpickle)
        # written, not only sized: a process that first touches a mapped page of a full disk would die of it
        shares_file.write_bytes(bytes(8 * len(arms)))
        pool = stack.enter_context(_pool(workers, file, shares_file))
        return {pool.submit(_run, number): arm for number, arm in enumerate(arms)}, _mapped(shares_file)
    except Exception as error:  # whatever an arm holds says so in its own way
        refused = _refused(error)
        if refused is None:
            raise Unsuited(f"the arms cannot be pickled ({_said(error)}); {REMEDY}") from error
        raise Unsuited(f"there is no room for the data or for processes ({_said(refused)})") from error


@contextmanager
def _pool(workers: int, file: Path, shares_file: Path) -> Iterator[Executor]:
    """Processes that have read the arms; whatever ends this early ends them at once."""
    from loky import ProcessPoolExecutor

    pool = ProcessPoolExecutor(
        workers, initializer=_start, initargs=(file, shares_file, os.getpid()), env=WORKER_ENVIRONMENT
    )
    finished = False
    try:
        yield pool
        finished = True
    finally:
        pool.shutdown(wait=finished, kill_workers=not finished)


def processors() -> int:
    """How many processes may compute at once: the threads that torch was given, on processors that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def _mapped(file: Path) -> NDArray[np.float64]:
    """The share of each arm, written by the process that measures it."""
    return np.memmap(file, np.float64, "r+")


def _refused(error: BaseException | None) -> OSError | None:
    """What the system refused, where that is behind an error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _said(error: Exception) -> str:
    """In one line."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_arms: list[Arm] = []
_shares: list[NDArray[np.float64]] = []
_failures: list[str] = []


def _start(file: Path, shares_file: Path, parent: int) -> None:
    # Ctrl-C reaches the whole group; the first process decides what becomes of it
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(parent, file.parent), daemon=True).start()
    torch.set_num_threads(1)
    try:
        # written by this program a moment ago
        _arms[:] = torch.load(file, mmap=True, weights_only=False)
    except Exception as error:  # a process that dies here could not say why
        _failures.append(_said(error))
    _shares[:] = [_mapped(shares_file)]


def _follow(parent: int, folder: Path) -> None:
    """End this process when the first one has ended, and remove what that one can no longer remove."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _run(number: int) -> Cell:
    if _failures:
        raise Unsuited(f"processes cannot read the arms ({_failures[0]}); {REMEDY}")

    def tell(_name: str, share: float) -> None:
        _shares[0][number] = share

    return timed(_arms[number], tell)
