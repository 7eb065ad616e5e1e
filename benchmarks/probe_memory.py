"""Resident memory of probing one bag of 100,000 vectors among 500 small ones, method by method.

Each method runs in a process of its own. Printed: the data's bytes, and the peak resident memory above the process that has
imported everything but holds no data, as a multiple of the data's bytes (1.0 of it is the data itself).

    python -m benchmarks.probe_memory [--methods fast]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

BIG, SMALL_BAGS, DIM = 100_000, 500, 384


def run(method: str) -> None:
    """In the child: build the data, probe, print bytes and peak."""
    import torch

    import cenote.features  # noqa: F401
    from cenote.core import Bags
    from cenote.features.dataset import TokenDataset
    from cenote.jobs.probe import Recipe, compare

    torch.set_num_threads(2)
    warm = torch.ones(200, 200)
    (warm @ warm).sum()
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (SMALL_BAGS + 1,), generator=generator)
    lengths[0] = BIG
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    values = torch.randn(int(offsets[-1]), DIM, generator=generator)
    y = torch.arange(SMALL_BAGS + 1) % 2
    data = TokenDataset(
        name="one huge bag",
        x=Bags(values, offsets),
        y=y,
        task="binary",
        classes=("no", "yes"),
        ids=tuple(map(str, range(SMALL_BAGS + 1))),
        split=torch.arange(SMALL_BAGS + 1) % 5 // 2,
    )
    comparison = compare(data, [method], seeds=1, recipe=Recipe(epochs=2), references=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"skipped": comparison.skipped, "bytes": data.nbytes(), "peak": peak - baseline}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="fast")
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        run(arguments.child)
        return
    from cenote.jobs.probe.arms import chosen_methods

    for method in chosen_methods(arguments.methods):
        command = [sys.executable, "-m", "benchmarks.probe_memory", "--child", method]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{method:<24} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        found = json.loads(done.stdout)
        if method in found["skipped"]:
            print(f"{method:<24} skipped: {found['skipped'][method]}")
            continue
        ratio = found["peak"] / found["bytes"]
        print(
            f"{method:<24} {found['peak'] / 2**20:7.0f} MiB = {ratio:.2f} times the data's {found['bytes'] / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
