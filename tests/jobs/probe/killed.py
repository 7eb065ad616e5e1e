"""Probes with two workers in child processes that are killed at random moments, until one of them ends by itself.

python killed.py OUT KILLS SEED -> prints, as JSON, what each kill found: the signal, how many cells were finished, which
processes and temporary files were left, and how long the processes took to go.

TMPDIR must be empty, and this program's alone.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from tests.jobs.probe.conftest import make_dataset  # noqa: E402

from cenote.cli import interrupts  # noqa: E402
from cenote.jobs.probe import Comparison, Recipe, compare  # noqa: E402

METHODS = ["mean", "max", "gem", "simpool", "abmil", "cait"]
RECIPE = Recipe(learning_rates=(1e-2,), epochs=100, patience=100)
PATIENCE = 60.0


def run(out: Path) -> Comparison:
    return compare(make_dataset(), METHODS, seeds=2, recipe=RECIPE, out=out, workers=2)


def child(out: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    # what they say of the end of their parent is for nobody
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    interrupts.heed()
    try:
        os._exit(0 if run(out).complete else interrupts.EXIT)
    except KeyboardInterrupt:
        os._exit(interrupts.EXIT)


def living(folder: str) -> list[int]:
    """Other processes that were started with this folder for temporary files."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        pid = int(environment.parent.name)
        try:
            if pid != os.getpid() and f"TMPDIR={folder}".encode() in environment.read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found


def main(out: Path, kills: int, seed: int) -> None:
    folder = tempfile.gettempdir()
    rng = random.Random(seed)
    start = time.perf_counter()
    if os.waitpid(child(out.with_name("undisturbed")), 0)[1]:
        raise SystemExit("a run that nobody disturbed failed")
    longest = 1.1 * (time.perf_counter() - start)
    found = []
    while len(found) < kills:
        pid = child(out)
        time.sleep(rng.uniform(0, longest))
        number = signal.SIGKILL if len(found) % 2 else signal.SIGTERM
        os.kill(pid, number)
        os.waitpid(pid, 0)
        killed = time.perf_counter()
        while living(folder) and time.perf_counter() - killed < PATIENCE:
            time.sleep(0.1)
        cells = sorted((out / "cells").glob("*.safetensors"))
        left = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))
        found.append(
            {
                "signal": number.name,
                "cells": len(cells),
                "living": living(folder),
                "left": left,
                "seconds": time.perf_counter() - killed,
            }
        )
        if len(cells) > 4:
            # there must be work to interrupt
            for cell in cells[::2]:
                cell.unlink()
    run(out)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
