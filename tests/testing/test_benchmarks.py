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


def test_the_page_shows_what_looking_in_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "build_benchmark_page.py"))

    def spread(median: float) -> dict[str, float]:
        return {"median": median, "low": median - 0.25, "high": median + 0.25}

    def row(name: str, ratio: float) -> dict[str, object]:
        return {"name": name, "wall_s": spread(8), "cpu_s": spread(2), "cpu_ratio": spread(ratio)}

    names = {
        "as loaded": 1.0,
        "rows recorded": 1.03,
        "rows recorded and edited": 1.2,
        "eager": 1.5,
        "eager, all maps": 2,
    }
    content = {
        "command": "python -m benchmarks.live",
        "machine": {"processor": "p", "threads": 1, "torch": "t", "cores": 2},
        "load_before": [3.5],
        "rounds": 3,
        "tokens": 1024,
        "long_tokens": 8192,
        "prompt_tokens": 256,
        "decoded_tokens": 64,
        "largest_difference": 4e-6,
        "forward": [row(name, ratio) for name, ratio in names.items()],
        "decoding": [row("decoding", 1.0), row("decoding, rows edited", 1.25)],
        "extra_bytes": {"as loaded": 5e6, "rows recorded": 26e6, "eager, all maps": 9e8},
        "long_extra_bytes": {"as loaded": 8e8, "rows recorded": 9e8},
        "at_most": {"rows recorded": 1.05, "rows recorded and edited": 1.1},
        "decoding_at_least": 0.9,
        "recording_bytes_at_most": 20e6,
        "long_bytes_at_most": 1.5e9,
    }
    lines = "\n".join(page["live"](content))
    assert "| rows recorded | 2.00 | **1.030** (0.780 to 1.280) | at most 1.05 | 26.0 |" in lines
    assert "**1.200** (0.950 to 1.450) | at most 1.10, missed |" in lines
    assert "21.0 MB more than the model as it is loaded (wanted at most 20, missed)" in lines
    assert "with rows recorded 900 MB (wanted at most 1500)" in lines
    assert "**0.800** (0.667 to 1.000) | at least 0.90, missed |" in lines
    assert "load before the start 3.50 on 2 cores; of a second on the clock the process had 0.25 s of a core" in lines
