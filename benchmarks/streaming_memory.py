"""Memory of pooling one hour of a stream: 360,000 frames of width 256, chunk by chunk, in constant memory.

Read after every minute of the stream: the resident memory of the process, and the bytes that the state of the pool owns. Both
must stay flat; the command fails where the resident memory of the last three quarters of the hour lies more than 5 % above that
of the first quarter, or the state grows at all.

    python -m benchmarks.streaming_memory [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from benchmarks.timing import machine

from cenote.pool import AttentiveTemporalPool

COMMAND = "python -m benchmarks.streaming_memory"
FRAMES, DIM, CHUNK = 360_000, 256, 100
MINUTE = 6_000
ALLOWED = 0.05


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def follow(pool: AttentiveTemporalPool, frames: int, chunk: int, seed: int = 0) -> tuple[list[int], list[int], float]:
    """Pool a stream of noise: resident memory and bytes of the state after every minute, and the seconds that it took."""
    generator = torch.Generator().manual_seed(seed)
    state, sizes, memory = None, [], []
    start = time.perf_counter()
    with torch.inference_mode():
        for done in range(0, frames, chunk):
            x = torch.randn(1, min(chunk, frames - done), pool.dim, generator=generator)
            _, state = pool.step(x, state)
            if (done + chunk) % MINUTE == 0:
                memory.append(resident())
                sizes.append(sum(t.untyped_storage().nbytes() for t in state if t is not None))
    return memory, sizes, time.perf_counter() - start


def growth(memory: list[int]) -> float:
    """The largest of the last three quarters over the largest of the first, minus one."""
    quarter = max(1, len(memory) // 4)
    return max(memory[quarter:]) / max(memory[:quarter]) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool = AttentiveTemporalPool(DIM)
    memory, sizes, seconds = follow(pool, FRAMES, CHUNK)
    grown = growth(memory)
    print(f"{FRAMES:,} frames of width {DIM} in chunks of {CHUNK}, {seconds:.1f} s")
    print(f"resident memory: {min(memory) / 2**20:.1f} to {max(memory) / 2**20:.1f} MiB, growth {100 * grown:.2f} %")
    print(f"state: {min(sizes):,} to {max(sizes):,} bytes")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "command": COMMAND,
            "machine": machine(),
            "frames": FRAMES,
            "dim": DIM,
            "chunk": CHUNK,
            "seconds": round(seconds, 2),
            "growth": round(grown, 6),
            "resident_bytes": memory,
            "state_bytes": sizes,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if grown > ALLOWED or len(set(sizes)) > 1:
        sys.exit("memory is not flat")


if __name__ == "__main__":
    main()
