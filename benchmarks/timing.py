"""Time two ways of doing the same thing against each other.

The two are called in turn (A B A B ...) after a warm-up, so that whatever else the machine does meets both, and each pair of
neighbouring calls gives one ratio. Reported: the median ratio, and the range that holds the middle 80 % of the ratios.

    pairs = [Pair("sum", "ours", lambda: a.sum(), "theirs", lambda: sum(a.tolist()))]
    run(pairs, __doc__, "python -m benchmarks.sums")

`run` reads the command line (`--json FILE`, `--threads N`, `--rounds N`), prints one table and writes the JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SHORTEST_SAMPLE = 2e-3
WARM_UP = 3


@dataclass(frozen=True)
class Pair:
    """Two ways of doing the same thing; the ratio reported is the time of `theirs` over that of `ours`."""

    name: str
    ours: str
    run_ours: Callable[[], object]
    theirs: str
    run_theirs: Callable[[], object]


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
    """How long the two of a pair took, in milliseconds, and how many times faster `ours` is."""

    name: str
    ours: str
    theirs: str
    rounds: int
    ours_ms: Spread
    theirs_ms: Spread
    ratio: Spread


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


def table(results: Iterable[Result]) -> str:
    """One line per pair."""
    rows = [("", "ours", "ms", "theirs", "ms", "times faster")]
    for r in results:
        ratio = f"{r.ratio.median:.3g} ({r.ratio.low:.3g} to {r.ratio.high:.3g})"
        rows.append((r.name, r.ours, f"{r.ours_ms.median:.3g}", r.theirs, f"{r.theirs_ms.median:.3g}", ratio))
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = machine()
    results = [time_pair(pair, arguments.rounds) for pair in pairs()]
    print(f"{before['processor']}, {arguments.threads} threads, torch {before['torch']}, load {before['load']}")
    print(f"median of {arguments.rounds} rounds in turn; in brackets what the middle 80 % of the rounds gave\n")
    print(table(results))
    if arguments.json:
        write_json(arguments.json, command, results, load_before=before["load"])
    return results
