"""The jaxtyping shapes of core are true: its tests pass with every shape checked, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# wrong input meets the shape checks before our own errors, and timings count the checks
LEFT_OUT = "not error and not wrong and not kernels and not cost and not linear_memory and not annotations"


def test_shapes_of_core_hold() -> None:
    command = [
        *(sys.executable, "-m", "pytest", str(HERE), "-q", "-x", "-k", LEFT_OUT, "-p", "no:cacheprovider"),
        *("--jaxtyping-packages=cenote.core,beartype.beartype", "--hypothesis-profile=cenote-few"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:]
