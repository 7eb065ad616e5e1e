"""Files that are either whole or not there, folders that one process writes to, and folders of what was saved."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cenote.core.errors import InputError

LOCK = ".lock"
UNFINISHED = ".unfinished"
"""At the end of what is being written beside a file, to take its place."""
TEMPORARY = "cenote-"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What network file systems say that know no locks."""


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that no reader, and no crash, ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
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


def json_text(value: Any, **how: Any) -> str:
    """JSON that every reader takes: it has no word for what is not known or infinite, so that is null.

    Args:
        value: as `json.dumps` takes it.
        how: its other arguments.

    Example:
        >>> json_text({"metric": float("nan"), "interval": (0.5, float("inf"))})
        '{"metric": null, "interval": [0.5, null]}'
    """
    return json.dumps(_null_for_nan(value), allow_nan=False, **how)


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _null_for_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left half written in a folder; only for the one who is `alone` there."""
    for file in folder.glob(f".*{UNFINISHED}"):
        file.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Nobody else, in this process or another, does the same in a folder; the lock goes with the process, however that ends.

    Args:
        folder: that is there.
        doing: what is done there, for those who come second.

    Raises:
        InputError: where somebody does, with the process.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    # some releases of filelock empty the file before they find out that it is taken
    owner = _owner(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"out: another {doing} is writing to {folder} ({owner}); wait for it, stop it, or name another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        warnings.warn(f"{folder}: its file system has no locks; let no other {doing} write to it", stacklevel=4)
    try:
        # for people; where the system lets nobody write to a file that is locked, they are told less
        with suppress(OSError):
            (folder / LOCK).write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        lock.release()


def _owner(lock: Path) -> str:
    try:
        return lock.read_text("utf-8", "replace")[:200].strip() or "unknown process"
    except OSError:
        return "unknown process"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for as long as this lasts; those that killed processes left are removed first.

    Raises:
        OSError: where there is no room for it.
    """
    from filelock import FileLock

    _remove_orphans(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_orphans(place: Path) -> None:
    """Delete the temporary folders whose owners hold their locks no longer."""
    from filelock import FileLock, Timeout

    for folder in place.glob(f"{TEMPORARY}*"):
        try:
            # a folder without a lock is another's, or being made
            mine = folder.lstat().st_uid == getattr(os, "getuid", int)()
            if not mine or folder.is_symlink() or (folder / LOCK).is_symlink() or not (folder / LOCK).is_file():
                continue
            with FileLock(folder / LOCK, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue


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
