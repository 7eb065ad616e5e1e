"""How time and memory of absorbed attention grow with tokens, width, queries and sets, beside a mean and MultiheadAttention.

One learned query, 12 heads, float32, forward; tokens of width 384 in one set, then one quantity varied at a time.
Peak memory is that above the tokens. `MultiheadAttention` is left out where it would take more than 2 GB or 3 s.
Reported besides: the slope of time against tokens in log-log, fitted over 10^2..10^6; wanted: 0.9 to 1.1.

    python -m benchmarks.scaling [--json FILE] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from benchmarks.timing import extra_memory, machine
from torch import Tensor, nn

from cenote.core import PaddedTokens, Projection, cross_attention

HEADS = 12
SECONDS_EACH = 0.25
LARGEST = 150_000
"""Tokens times sets up to which MultiheadAttention is measured, at width 384 and proportionally fewer above."""


class Point(NamedTuple):
    """One shape of one sweep."""

    sweep: str
    at: int
    batch: int = 1
    tokens: int = 4096
    dim: int = 384
    queries: int = 1


def points() -> Iterator[Point]:
    for exponent in (4, 5, 6, 7, 8, 9, 10, 11, 12):
        tokens = round(10 ** (exponent / 2))
        yield Point("tokens", tokens, tokens=tokens)
    for dim in (48, 96, 192, 384, 768, 1536):
        yield Point("dim", dim, dim=dim)
    for queries in (1, 2, 4, 8, 16, 32, 64):
        yield Point("queries", queries, queries=queries)
    for batch in (1, 4, 16, 64, 256):
        yield Point("sets", batch, batch=batch, tokens=196)


def ways(point: Point) -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(point.batch, point.tokens, point.dim)
    attention = nn.MultiheadAttention(point.dim, HEADS, batch_first=True).requires_grad_(False)
    query = torch.randn(point.queries, point.dim)

    def absorbed() -> Tensor:
        w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
        b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
        keys, values = Projection(w_k, b_k), Projection(w_v, b_v)
        output, _ = cross_attention(PaddedTokens(x), F.linear(query, w_q, b_q), key=keys, value=values, heads=HEADS)
        return attention.out_proj(output)

    found: dict[str, Callable[[], Tensor]] = {"cross_attention": absorbed, "mean": lambda: x.mean(1)}
    if point.batch * point.tokens * max(1.0, point.dim / 384) <= LARGEST:
        found["MultiheadAttention"] = lambda: attention(query.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        torch.testing.assert_close(absorbed(), found["MultiheadAttention"](), rtol=1e-4, atol=1e-5)
    return found


def seconds(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median time of each, called in turn for `SECONDS_EACH` altogether, at least 3 times."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    until = time.perf_counter() + SECONDS_EACH * len(calls)
    while len(next(iter(samples.values()))) < 3 or time.perf_counter() < until:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in samples.items()}


def slope(xs: list[float], ys: list[float]) -> float:
    """Least-squares slope of log y against log x."""
    lx, ly = torch.tensor(xs, dtype=torch.float64).log(), torch.tensor(ys, dtype=torch.float64).log()
    lx, ly = lx - lx.mean(), ly - ly.mean()
    return float((lx * ly).sum() / (lx * lx).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch may use (default %(default)s)")
    parser.add_argument("--memory", action="store_true", help="measure extra memory alone and print it as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        from cenote.core.memory import return_freed_blocks

        return_freed_blocks()
        print(json.dumps([{name: extra_memory(call) for name, call in ways(point).items()} for point in points()]))
        return
    before = machine()
    with torch.no_grad():
        times = [seconds(ways(point)) for point in points()]
    memory: list[dict[str, int]] = [{} for _ in times]
    if Path("/proc/self/clear_refs").exists():
        words = [sys.executable, "-m", "benchmarks.scaling", "--memory", "--threads", str(arguments.threads)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        memory = json.loads(done.stdout.splitlines()[-1])
    rows = [
        {**point._asdict(), "seconds": t, "extra_bytes": m} for point, t, m in zip(points(), times, memory, strict=True)
    ]
    print(f"{before['processor']}, {arguments.threads} threads, torch {before['torch']}, load {before['load']}\n")
    for row in rows:
        measured = [
            f"{name} {1e3 * t:.3g} ms, {row['extra_bytes'].get(name, 0) / 1e6:.3g} MB"
            for name, t in row["seconds"].items()
        ]
        print(f"{row['sweep']:<8} {row['at']:>9,}   {'   '.join(measured)}")
    sweep = [row for row in rows if row["sweep"] == "tokens"]
    slopes = {
        name: slope([row["at"] for row in sweep], [row["seconds"][name] for row in sweep])
        for name in ("cross_attention", "mean")
    }
    large = [row for row in sweep if row["at"] >= 1000]
    from_1000 = {name: slope([row["at"] for row in large], [row["seconds"][name] for row in large]) for name in slopes}
    print(f"\nslope of time against tokens, 10^2..10^6: {', '.join(f'{n} {s:.2f}' for n, s in slopes.items())}")
    print(f"from 10^3 on: {', '.join(f'{n} {s:.2f}' for n, s in from_1000.items())}")
    if arguments.json:
        content = {
            "command": "python -m benchmarks.scaling",
            "machine": machine(),
            "load_before": before["load"],
            "slopes": slopes,
            "slopes_from_1000": from_1000,
            "wanted": [0.9, 1.1],
            "points": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
