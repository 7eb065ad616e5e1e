"""`cenote reduce`, killed in the middle, goes on where it was, to the same verdict."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cenote.jobs.reduce import Frontier

COMMAND = (
    sys.executable,
    "-m",
    "cenote",
    "reduce",
    "--model",
    "hashed-words",
    "--methods",
    "sequential",
    "--factors",
    "2,4",
)


@pytest.mark.slow("three runs of the program")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    out, cells = tmp_path / "killed", tmp_path / "killed" / "cells"
    program = subprocess.Popen([*COMMAND, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while program.poll() is None and len(list(cells.glob("*.safetensors"))) < 4:
        time.sleep(0.02)
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in cells.glob("*.safetensors")}
    assert len(done) >= 4
    subprocess.run([*COMMAND, "--out", out], check=True, stdout=subprocess.DEVNULL)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert not (out / "indexes").exists()
    subprocess.run([*COMMAND, "--out", tmp_path / "whole"], check=True, stdout=subprocess.DEVNULL)
    found, expected = Frontier.load(out), Frontier.load(tmp_path / "whole")
    assert [(r.method, r.metric, r.bytes) for r in found.results] == [
        (r.method, r.metric, r.bytes) for r in expected.results
    ]
    assert (found.recommended, found.reason, found.lost) == (expected.recommended, expected.reason, expected.lost)
