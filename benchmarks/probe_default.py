"""Wall time of the default run: every fast pooling, 3 seeds, on the embedded digits, as `cenote probe` does it.

    python -m benchmarks.probe_default [--json FILE]

Prints the seconds per method (training of all seeds and learning rates; several methods at once), the total with everything
around it, and the 1-minute load average of the machine before the start: a busy machine makes the total meaningless.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    start, cpu = time.perf_counter(), sum(os.times()[:4])

    import torch

    from cenote.features import digits
    from cenote.jobs.probe import compare

    comparison = compare(digits(), "fast", seeds=3)
    found = {
        "methods": {r.method: round(r.seconds, 2) for r in comparison.results},
        "total_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(sum(os.times()[:4]) - cpu, 1),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
    }
    for method, seconds in found["methods"].items():
        print(f"{method:<24} {seconds:7.2f} s")
    print(
        f"{len(found['methods'])} methods x 3 seeds: {found['total_s']} s wall, {found['cpu_s']} s CPU, "
        f"{found['threads']} threads, load before {found['load_before']}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
