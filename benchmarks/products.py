"""What bounds the pools of `latent_attention` and `efficient_probing`: their products, and where their time goes.

For each of a pair: operations in its matrix products (two for a multiply-add), the rate at which it gets them done, the rate
of a square float32 product on the same threads, and which of torch's operations take the time.

    python -m benchmarks.products [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks import efficient_probing, latent_attention
from benchmarks.timing import machine
from torch.profiler import ProfilerActivity, profile

from cenote.jobs.probe.cost import OperationCounter

SIDE = 2048
LARGEST = 4
COUNTED_BY_HAND = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
        2 * query[:-1].numel() * key[-2] * (key[-1] + value[-1])
    )
}


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median of some calls."""
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def operations(call: Callable[[], object]) -> int:
    """In matrix products and attention."""
    with OperationCounter(COUNTED_BY_HAND) as counter:
        call()
    return counter.operations


def shares(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """torch's operations that take most of the time, and their shares of it; the rest is Python, and what is smaller."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        whole = time.perf_counter() - start
    taken = {e.key: e.self_cpu_time_total / 1e6 / whole for e in profiler.key_averages() if e.key.startswith("aten::")}
    return {name: round(taken[name], 3) for name in sorted(taken, key=taken.__getitem__, reverse=True)[:LARGEST]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    square = torch.randn(SIDE, SIDE)
    rate = 2 * SIDE**3 / seconds(lambda: square @ square, arguments.rounds)
    print(f"a product of {SIDE} x {SIDE}: {rate / 1e9:.0f} GFLOP/s")
    rows: list[dict[str, Any]] = []
    for pair in itertools.chain(latent_attention.pairs(), efficient_probing.pairs()):
        if pair.target is None or pair.target < 1:
            continue
        for who, call in ((pair.ours, pair.run_ours), (pair.theirs, pair.run_theirs)):
            done, taken = operations(call), seconds(call, arguments.rounds)
            row = {"name": pair.name, "of": who, "operations": done, "seconds": taken, "rate": done / taken}
            row["shares"] = shares(call, arguments.rounds)
            rows.append(row)
            parts = ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in row["shares"].items())
            print(
                f"{pair.name}, {who}: {done / 1e9:.2f} GFLOP in {1e3 * taken:.1f} ms, {done / taken / 1e9:.0f} GFLOP/s; {parts}"
            )
    if arguments.json:
        content = {
            "command": "python -m benchmarks.products",
            "machine": machine(),
            "load_before": round(load, 2),
            "square": {"side": SIDE, "rate": rate},
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
