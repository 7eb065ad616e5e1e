"""What the examples share: they print each command and run it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time


def cenote(*arguments: object) -> None:
    """Run `cenote ...` in a process of its own, offline, and say how long it took."""
    words = ["cenote", *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    code = "import sys; from cenote.cli import main; sys.argv[0] = 'cenote'; main()"
    done = subprocess.run([sys.executable, "-c", code, *words[1:]], env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.returncode)
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)
