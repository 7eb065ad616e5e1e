"""Measure arms: what is finished is kept, what is missing is run, and Ctrl-C loses nothing that is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cenote.core.files as files
from cenote.compare.arms import Arm, OnShare, unheard
from cenote.compare.cells import Cell, Cells, cell_key
from cenote.compare.processes import finished, processors, run_in_processes, run_in_turn
from cenote.compare.result import FILE
from cenote.compare.sources import source_digest
from cenote.core.errors import InputError
from cenote.core.seeded import seeded

PROCESSES_PAY_FROM = 2.0
"""Seconds of work, if every arm were as cheap as the baseline, from which starting processes pays."""

CELLS = "cells"
"""The folder of finished cells in that of results."""

Engine = Callable[[Sequence[Arm], OnShare], Iterator[tuple[Arm, Cell]]]
"""Runs all arms somewhere, and gives their cells as they finish; see `cenote.scale.RaySweep`."""


@dataclass(frozen=True)
class Measured:
    """What is finished.

    Attributes:
        arms: in the order that they were given in.
        cells: of each arm, by its name.
        skipped: arm -> why it could not be measured.
        complete: False after an interruption.
    """

    arms: tuple[Arm, ...]
    cells: dict[str, Cell]
    skipped: dict[str, str]
    complete: bool = True


def measure(
    arms: Sequence[Arm],
    baseline: str,
    *,
    needed: Sequence[str] = (),
    folder: Path | None = None,
    workers: int | None = None,
    engine: Engine | None = None,
    on_share: OnShare = unheard,
) -> Measured:
    """The cells of all arms that fit.

    Args:
        arms: what is compared, in the order in which they are run one by one; controls among them.
        baseline: the arm without which there is no comparison; it is run first.
        needed: names of other arms without which there is none; they are run next.
        folder: of finished cells, which are not run again; `None`: nothing is written.
        workers: how many arms at once, in processes of their own. `None`: one per thread of torch where all arms gain by
            that and there is enough to do, else one.
        engine: runs the arms elsewhere, instead of `workers`.
        on_share: progress.

    Returns:
        The finished arms; after Ctrl-C those that had finished, if the baseline and what is needed are among them.

    Raises:
        InputError: where two arms share a name, there is no baseline, it is a reference, or it does not fit.
    """
    names = [arm.name for arm in arms]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InputError(f"arms: expected different names, got {', '.join(twice)} more than once")
    if baseline not in names:
        raise InputError(f"baseline: {baseline} is not among the arms {', '.join(names)}")
    if arms[names.index(baseline)].reference:
        raise InputError(f"baseline: {baseline} is a reference; name an arm that may be recommended")
    store = None if folder is None else Cells(folder)
    cells: dict[str, Cell] = {}
    keys: dict[str, str] = {}
    skipped: dict[str, str] = {}
    missing: list[Arm] = []
    for arm in arms:
        with seeded(0):
            reason = arm.unfit()
        if reason is not None:
            if arm.name == baseline:
                raise InputError(f"{arm.name}: {reason}")
            skipped[arm.name] = reason
            on_share(arm.name, 1.0)
            continue
        cell = None
        if store is not None:
            keys[arm.name] = key_of(arm)
            cell = store.load(arm.name, keys[arm.name])
            # what no version wrote is no measurement
            cell = cell if cell is not None and _is_measurement(cell, arm) else None
        if cell is None:
            missing.append(arm)
        else:
            cells[arm.name] = cell
            on_share(arm.name, 1.0)

    def keep(cell: Cell) -> None:
        if store is not None:
            store.save(keys[cell.name], cell)
        cells[cell.name] = cell

    complete = True
    try:
        run = engine(missing, on_share) if engine else _run(missing, cells, [baseline, *needed], workers, on_share)
        for arm, cell in run:
            keep(cell)
            on_share(arm.name, 1.0)
    except KeyboardInterrupt:
        if not {baseline, *needed} <= cells.keys():
            raise
        complete = False
    done = tuple(arm for arm in arms if arm.name in cells)
    for arm in done:
        cell = finished(arm, cells[arm.name])
        if cell is not cells[arm.name]:
            keep(cell)
    return Measured(done, cells, skipped, complete)


def key_of(arm: Arm) -> str:
    """Text that changes whenever the arm's cell could: with what the arm says of itself, and with the code that it runs."""
    kind = f"{type(arm).__module__}.{type(arm).__qualname__}"
    try:
        of = json.loads(json.dumps(dict(arm.key())))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{arm.name}: its key() cannot be written as JSON ({error}); give text, numbers and lists"
        ) from None
    return cell_key({"kind": kind, "arm": arm.name, "of": of, "sources": source_digest(*arm.sources())})


def _is_measurement(cell: Cell, arm: Arm) -> bool:
    """Whether a stored cell is this arm's, with scores, and says how long it took."""
    scores, seconds = cell.tensors.get("scores"), cell.record.get("seconds")
    return cell.name == arm.name and scores is not None and scores.dim() >= 2 and isinstance(seconds, int | float)


@contextmanager
def prepared(out: Path | None, job: str | None = None) -> Iterator[Path | None]:
    """A folder to write results to, with one for cells in it, to which nobody else writes meanwhile; of `None`, none.

    Args:
        out: the folder.
        job: that writes, as its comparison says under `job`; None for one that says nothing.

    Raises:
        InputError: where it cannot be one, another comparison is writing to it, or it holds what another job found.
    """
    if out is None:
        yield None
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; name a folder")
    try:
        (out / CELLS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot write to {out}: {error.strerror}; name another folder") from error
    with files.alone(out, "comparison"):
        _require_own(out, job)
        for folder in (out, out / CELLS):
            files.remove_unfinished(folder)
        yield out


def _require_own(out: Path, job: str | None) -> None:
    """What another job found is not written over; what cannot be read is none's."""
    try:
        held = files.read_json(out / FILE)
    except (OSError, ValueError):
        return
    other = held.get("job") if isinstance(held, dict) else job
    if other != job:
        raise InputError(f"out: {out} holds what another job found ({other or 'probe'}); name another folder")


def _run(
    arms: list[Arm], cells: dict[str, Cell], needed: Sequence[str], workers: int | None, on_share: OnShare
) -> Iterator[tuple[Arm, Cell]]:
    """Cells of all arms, of what is needed first: how long the baseline takes says whether processes of their own pay."""
    yield from run_in_turn([arm for name in needed for arm in arms if arm.name == name], on_share)
    others = [arm for arm in arms if arm.name not in needed]
    if workers is None:
        least = float(cells[needed[0]].record["seconds"]) * len(others)
        pays = least >= PROCESSES_PAY_FROM and all(arm.gains_by_processes() for arm in others)
        workers = processors() if pays else 1
    workers = min(workers, len(others))
    if workers <= 1:
        yield from run_in_turn(others, on_share)
    else:
        yield from run_in_processes(others, workers, on_share)
