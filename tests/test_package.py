"""The wheel holds what the package reads at run time."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "cenote"


@pytest.mark.slow("pip fetches what builds the wheel")
def test_wheel_holds_code_and_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.getinfo(name).file_size for name in archive.namelist()}

    wanted = {
        f"cenote/{p.relative_to(SOURCE).as_posix()}": p.stat().st_size
        for p in SOURCE.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {"cenote/catalog/systems.toml", "cenote/catalog/methods.toml"} <= wanted.keys()
    assert {"cenote/py.typed", "cenote/pool/__init__.pyi"} <= wanted.keys()
    assert any(name.endswith(".safetensors") for name in wanted)
    assert {name: packed.get(name) for name in wanted} == wanted
    elsewhere = {name.split("/")[0] for name in packed} - {"cenote"}
    assert all(name.endswith(".dist-info") for name in elsewhere)
