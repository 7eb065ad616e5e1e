import os
import subprocess
import sys
from pathlib import Path

from tests.report.factory import make_comparison, write_run


def cenote(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cenote.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_page_is_rebuilt(tmp_path: Path) -> None:
    write_run(tmp_path, make_comparison(3), items=2)
    done = cenote("report", str(tmp_path))
    assert done.returncode == 0, done.stderr
    page = tmp_path / "report.html"
    assert done.stdout == f"report: {page}\n"
    first = page.read_bytes()
    page.write_text("old")
    assert cenote("report", str(tmp_path)).returncode == 0
    assert page.read_bytes() == first


def test_a_folder_without_results(tmp_path: Path) -> None:
    done = cenote("report", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "no comparison.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()
