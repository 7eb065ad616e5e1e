"""Seconds from starting `cenote probe` to its first line, against importing torch alone.

Each in a process of its own, in turn; the probe is stopped as soon as it has printed something.

    python -m benchmarks.startup [--json FILE] [--threads N] [--rounds N]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from benchmarks.timing import Pair, run

PROBE = "import sys; from cenote.cli import main; sys.argv[0] = 'cenote'; main()"
WANTED = 2.5


def first_line() -> None:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-u", "-c", PROBE, "probe", "--out", out]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "120"}
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()
        process.wait()
        if not line.strip():
            raise RuntimeError("cenote probe ended without a line")


def import_torch() -> None:
    subprocess.run([sys.executable, "-c", "import torch"], check=True)


def pairs() -> Iterator[Pair]:
    yield Pair(
        "from the start to the first line",
        "cenote probe",
        first_line,
        "import torch",
        import_torch,
        note=f"Wanted: less than {WANTED} s to the first line.",
    )


if __name__ == "__main__":
    run(pairs, __doc__, "python -m benchmarks.startup", rounds=5)
