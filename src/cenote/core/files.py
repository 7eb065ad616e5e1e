"""Files that are either whole or not there, and folders of what was saved."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cenote.core.errors import InputError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that no reader, and no crash, ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def require_format(folder: Path, card: Mapping[str, Any], known: int) -> None:
    """Raise `InputError` unless the card of what was saved in a folder names the format that is known.

    >>> require_format(Path("best"), {"format": 2}, 1)
    Traceback (most recent call last):
    cenote.core.errors.InputError: best: was saved in format 2; this cenote reads 1
    """
    if card.get("format") != known:
        raise InputError(f"{folder}: was saved in format {card.get('format')}; this cenote reads {known}")
