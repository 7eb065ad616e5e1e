"""Time two ways of doing the same thing against each other.

The two are called in turn (A B A B ...) after a warm-up, so that whatever else the machine does meets both, and each pair of
neighbouring calls gives one ratio. Reported: the median ratio, and the range that holds the middle 80 % of the ratios.

    pairs = [Pair("sum", "ours", lambda: a.sum(), "theirs", lambda: sum(a.tolist()))]
    run(pairs, __doc__, "python -m benchmarks.sums")

`run` reads the command line (`--json FILE`, `--threads N`, `--rounds N`), prints one table and writes the JSON file. Where a
pair asks for it, a process of its own then measures how much memory each of the two takes while it runs (`extra_memory`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

SHORTEST_SAMPLE = 2e-3
WARM_UP = 3


@dataclass(frozen=True)
class Pair:
    """Two ways of doing the same thing; the ratio reported is the time of `theirs` over that of `ours`.

    Attributes:
        target: how many times faster `ours` is meant to be.
        memory: whether to measure what both take while they run.
        memory_target: how many times less `ours` is meant to take; implies `memory`.
        note: what a reader of the row must know.
    """

    name: str
    ours: str
    run_ours: Callable[[], object]
    theirs: str
    run_theirs: Callable[[], object]
    target: float | None = None
    memory: bool = False
    memory_target: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """The median, and the range that holds the middle 80 %."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(*(float(f"{v:.4g}") for v in (statistics.median(samples), tenths[0], tenths[-1])))


@dataclass(frozen=True)
class Result:
    """How long the two of a pair took, in milliseconds, and how many times faster `ours` is; what they took of memory."""

    name: str
    ours: str
    theirs: str
    rounds: int
    ours_ms: Spread
    theirs_ms: Spread
    ratio: Spread
    target: float | None = None
    note: str = ""
    ours_bytes: int | None = None
    theirs_bytes: int | None = None
    memory_target: float | None = None


def time_pair(pair: Pair, rounds: int = 30, synchronise: Callable[[], object] | None = None) -> Result:
    """Call the two of a pair in turn.

    Args:
        pair: what is compared.
        rounds: how many times each is timed; at least 2.
        synchronise: called before the clock is read, where work runs on behind the caller's back (a GPU).
    """
    calls = pair.run_ours, pair.run_theirs
    repeats = []
    for call in calls:
        for _ in range(WARM_UP):
            seconds = _seconds(call, 1, synchronise)
        repeats.append(max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-9))))
    samples: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, repeat, times in zip(calls, repeats, samples, strict=True):
                times.append(_seconds(call, repeat, synchronise))
    finally:
        gc.enable()
    ours, theirs = samples
    return Result(
        pair.name,
        pair.ours,
        pair.theirs,
        rounds,
        Spread.of([1e3 * t for t in ours]),
        Spread.of([1e3 * t for t in theirs]),
        Spread.of([b / a for a, b in zip(ours, theirs, strict=True)]),
        target=pair.target,
        note=pair.note,
        memory_target=pair.memory_target,
    )


def _seconds(call: Callable[[], object], repeats: int, synchronise: Callable[[], object] | None) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if synchronise is not None:
        synchronise()
    return (time.perf_counter() - start) / repeats


def machine() -> dict[str, object]:
    """What a reader must know of the machine to understand the numbers."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found: dict[str, str] = {}
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
        if "model name" in found:
            parts = (found.get("cpu family"), found.get("model"), found.get("stepping"))
            return f"{found['model name']} (family {parts[0]}, model {parts[1]}, stepping {parts[2]})"
    return platform.processor() or platform.machine()


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes of resident memory that a call takes at its peak, above what is there before and its first call left behind.

    Linux only. Blocks that are freed must go back to the system: see `cenote.core.memory.return_freed_blocks`.
    """
    from cenote.core.memory import return_holes

    call()
    gc.collect()
    return_holes()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _measure_memory(pairs: Iterable[Pair]) -> dict[str, tuple[int, int]]:
    """Name of a pair -> extra memory of `ours` and of `theirs`."""
    return {
        pair.name: (extra_memory(pair.run_ours), extra_memory(pair.run_theirs))
        for pair in pairs
        if pair.memory or pair.memory_target is not None
    }


def _with_memory(results: list[Result], command: str, threads: int) -> list[Result]:
    """Ask a process of its own, as this one keeps freed memory for later."""
    words = [sys.executable, *command.split()[1:], "--memory", "--threads", str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} --memory failed:\n{done.stderr[-2000:]}")
    found: dict[str, tuple[int, int]] = json.loads(done.stdout.splitlines()[-1])
    return [
        replace(r, ours_bytes=found[r.name][0], theirs_bytes=found[r.name][1]) if r.name in found else r
        for r in results
    ]


def table(results: Iterable[Result]) -> str:
    """One line per pair."""
    results = list(results)
    targets, memory = any(r.target for r in results), any(r.ours_bytes is not None for r in results)
    header = ("", "ours", "ms", "theirs", "ms", "times faster")
    rows = [(*header, *(["wanted"] if targets else []), *(["ours, extra MB", "theirs", "wanted"] if memory else []))]
    for r in results:
        ratio = f"{r.ratio.median:.3g} ({r.ratio.low:.3g} to {r.ratio.high:.3g})"
        row = (r.name, r.ours, f"{r.ours_ms.median:.3g}", r.theirs, f"{r.theirs_ms.median:.3g}", ratio)
        if targets:
            row = (*row, f"{r.target:g}" if r.target else "")
        if memory:
            sizes = ["" if b is None else f"{b / 1e6:.3g}" for b in (r.ours_bytes, r.theirs_bytes)]
            row = (*row, *sizes, f"1/{r.memory_target:g}" if r.memory_target else "")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = {2, 4}

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )

    return "\n".join(line(row).rstrip() for row in rows)


def write_json(path: Path, command: str, results: Iterable[Result], **more: object) -> None:
    """Everything that was measured and where."""
    content = {"command": command, "machine": machine(), **more, "pairs": [asdict(r) for r in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def run(
    pairs: Callable[[], Iterable[Pair]], description: str | None, command: str, *, threads: int = 2, rounds: int = 30
) -> list[Result]:
    """The command line of a benchmark: time all pairs, print one table, write the JSON file that was asked for.

    Args:
        pairs: makes the pairs; called after the number of threads is set.
        description: for `--help`.
        command: how to run it again.
        threads, rounds: the defaults.
    """
    import torch

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    parser.add_argument("--threads", type=int, default=threads, help="threads that torch may use (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="times that each is called (default %(default)s)")
    parser.add_argument("--memory", action="store_true", help="measure extra memory alone and print it as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        from cenote.core.memory import return_freed_blocks

        return_freed_blocks()
        print(json.dumps(_measure_memory(pairs())))
        return []
    before = machine()
    asks_memory = False
    results = []
    for pair in pairs():
        results.append(time_pair(pair, arguments.rounds))
        asks_memory |= pair.memory or pair.memory_target is not None
    if asks_memory and Path("/proc/self/clear_refs").exists():
        results = _with_memory(results, command, arguments.threads)
    print(f"{before['processor']}, {arguments.threads} threads, torch {before['torch']}, load {before['load']}")
    print(f"median of {arguments.rounds} rounds in turn; in brackets what the middle 80 % of the rounds gave\n")
    print(table(results))
    for note in dict.fromkeys(r.note for r in results if r.note):
        print(f"\n{note}")
    if arguments.json:
        write_json(arguments.json, command, results, load_before=before["load"])
    return results
