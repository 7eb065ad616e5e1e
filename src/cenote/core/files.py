"""Files that are either whole or not there, and folders of what was saved."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
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


def read_card(
    path: Path, remedy: str, optional: Sequence[str] = (), **fields: type | tuple[type, ...]
) -> dict[str, Any]:
    """What a JSON file says of what was saved beside it.

    Args:
        path: of the file.
        remedy: what to do where it is damaged.
        optional: fields that may be missing.
        fields: those that must be there, and of which type each is; a bool is no number.

    Raises:
        InputError: where it is no JSON object with such fields.
        OSError: where it cannot be read.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "card.json"
        ...     _ = path.write_text('{"dim": "8"}')
        ...     read_card(path, "save it again", dim=int)
        Traceback (most recent call last):
        cenote.core.errors.InputError: ...card.json: is damaged (dim: expected int, got '8'); save it again
    """
    try:
        card = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged ({error}); {remedy}") from error
    problem = None if isinstance(card, dict) else f"expected an object, got {type(card).__name__}"
    for name, kind in () if problem else fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if name not in card:
            problem = problem if name in optional else f"{name} is missing"
        elif not isinstance(card[name], kinds) or (isinstance(card[name], bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            problem = f"{name}: expected {wanted}, got {card[name]!r}"
    if problem:
        raise InputError(f"{path}: is damaged ({problem}); {remedy}")
    return card


def require_format(folder: Path, card: Mapping[str, Any], *known: int) -> None:
    """Raise `InputError` unless the card of what was saved in a folder names a format that is known.

    >>> require_format(Path("best"), {"format": 2}, 1)
    Traceback (most recent call last):
    cenote.core.errors.InputError: best: was saved in format 2; this cenote reads 1
    """
    if card.get("format") not in known:
        reads = " and ".join(map(str, known))
        raise InputError(f"{folder}: was saved in format {card.get('format')}; this cenote reads {reads}")
