"""The benchmarks' checks, their memory, and the page that is made of their results."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.all import BENCHMARKS
from benchmarks.checks import require_same
from benchmarks.scaling import slope
from benchmarks.timing import extra_memory

ROOT = Path(__file__).resolve().parents[2]
NO_PROC = not Path("/proc/self/clear_refs").exists()


def test_equal_to_rounding_passes_and_different_does_not() -> None:
    x = torch.randn(100, dtype=torch.float64)
    require_same(x, x + 1e-12)
    require_same([x.float()], [x.float() * (1 + 2e-6)])
    with pytest.raises(AssertionError, match="differs by"):
        require_same(x, x + 1e-6)
    with pytest.raises(AssertionError, match="result 1"):
        require_same([x, x], [x, x.float()])


@pytest.mark.skipif(NO_PROC, reason="no /proc/self/clear_refs")
def test_extra_memory_is_what_a_call_takes_at_its_peak() -> None:
    size = 40 * 2**20  # blocks of this size always come from the system and go back to it
    taken = extra_memory(lambda: torch.ones(size // 4).sum())
    assert 0.9 * size < taken < 1.3 * size


def test_slope_is_the_exponent() -> None:
    assert slope([1.0, 10.0, 100.0], [3.0, 3 * 10**1.5, 3000.0]) == pytest.approx(1.5)


def test_every_benchmark_has_a_module() -> None:
    for name in BENCHMARKS:
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()


def test_without_a_gpu_its_benchmark_says_so_and_ends_with_2() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False, cwd=ROOT, env=hidden
    )
    assert done.returncode == 2
    assert "nothing was measured" in done.stderr


def test_the_page_shows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "build_benchmark_page.py"))
    spread = {"median": 12.5, "low": 11.0, "high": 14.0}
    pair = {
        "name": "a pair",
        "ours": "x",
        "theirs": "y",
        "rounds": 3,
        **dict.fromkeys(("ours_ms", "theirs_ms", "ratio"), spread),
        "target": 20,
        "ours_bytes": 10**6,
        "theirs_bytes": 5 * 10**6,
        "memory_target": 4,
        "note": "a note",
    }
    machine = {"processor": "p", "threads": 2, "torch": "t"}
    content = {"command": "python -m benchmarks.pma", "machine": machine, "load_before": [0.1], "pairs": [pair]}
    (tmp_path / "pma.json").write_text(json.dumps(content))
    for name, value in {"RESULTS": tmp_path, "PAGE": tmp_path / "page.md", "PLOTS": tmp_path / "plots"}.items():
        monkeypatch.setitem(page["main"].__globals__, name, value)
    page["main"]()
    text = (tmp_path / "page.md").read_text()
    assert "**12.5** (11 to 14) | 20, missed | 1 | 5 | 1/4 |" in text
    assert "a note" in text
    assert "no machine with a GPU was at hand" in text
