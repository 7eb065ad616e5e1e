"""Files that are either whole or not there, folders that one process writes to, and folders of what was saved.

Whatever cenote writes and reads again carries its SHA-256: a JSON object beside its fields, a safetensors file in its metadata.
What was changed since is refused. What was written before there were digests is read, and `UncheckedWarning` tells so.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.json_text import json_text

LOCK = ".lock"
UNFINISHED = ".unfinished"
"""At the end of what is being written beside a file, to take its place."""
TEMPORARY = "cenote-"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What network file systems say that know no locks."""
DIGEST = "sha256"
"""Of a JSON object, the field with the digest of all others; of a safetensors file, the same of its metadata and tensors."""

TENSORS = "tensors_sha256"
"""Of a card, the field with the digest of the safetensors file that belongs to it."""


class UncheckedWarning(UserWarning):
    """Something was read that was written before cenote kept digests: whether it is as it was written cannot be told."""


class Stored(NamedTuple):
    """What a safetensors file holds, and the digest that was compared; `None` of a file from before there were digests."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    digest: str | None


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that no reader, and no crash, ever sees half of it."""
    # names of files may hold bytes that are no text
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with whole(path) as file:
        file.write(data)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its place when all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def require_place(path: Path, argument: str) -> None:
    """Raise `InputError` where a file cannot be written to a place, as far as can be told without writing it."""
    if path.is_dir():
        raise InputError(f"{argument}: {path} is a folder; name a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{argument}: cannot make {path}: {above} is a file; name another place")


def inside(folder: Path, name: object) -> Path:
    """A path in a folder, by the name that a file in that folder gives.

    Raises:
        ValueError: where the name leads out of the folder.

    Example:
        >>> inside(Path("model"), "0_Transformer").as_posix()
        'model/0_Transformer'
        >>> inside(Path("model"), "../secret")
        Traceback (most recent call last):
        ValueError: '../secret' leads out of model
    """
    parts = PurePosixPath(str(name).replace("\\", "/"))
    if not isinstance(name, str) or "\0" in name or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{name!r} leads out of {folder}")
    return folder / parts


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The bytes of a file, where it is one: devices and pipes, which never end or never begin, are not read.

    Raises:
        OSError: where it is no file, is not there, or is longer than `most`.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no file")
        if most is not None and found.st_size > most:
            raise OSError(f"{path} has {found.st_size:,} bytes, expected no more than {most:,}")
        return file.read()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its digest.

    >>> opened(sealed({"dim": 8})), opened({**sealed({"dim": 8}), "dim": 9})
    Traceback (most recent call last):
    ValueError: it was changed after it was written: its digest is another one
    """
    plain = json.loads(json_text({k: v for k, v in content.items() if k != DIGEST}))
    return {**plain, DIGEST: digest_of(plain)}


def opened(content: Mapping[str, Any], where: object = "it") -> dict[str, Any]:
    """A JSON object without its digest, which is compared.

    Raises:
        ValueError: where it was changed.
    """
    plain = {k: v for k, v in content.items() if k != DIGEST}
    if DIGEST not in content:
        unchecked(where)
    elif content[DIGEST] != digest_of(plain):
        raise ValueError("it was changed after it was written: its digest is another one")
    return plain


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: where it is none.
        OSError: where it cannot be read.
    """
    try:
        return json.loads(read_regular(path).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file in one step: its digest."""
    # a slice of a large tensor would otherwise bring all of it, or be refused
    kept = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    digest = digest_of(dict(metadata or {}), kept)
    write_whole(path, save(kept, metadata={**(metadata or {}), DIGEST: digest}))
    return digest


def read_tensors(path: Path, old: bool = True) -> Stored:
    """What `write_tensors` wrote; where `old`, from before there were digests too.

    Raises:
        ValueError: where it is no whole safetensors file, or was changed.
        OSError: where it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OverflowError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    digest = metadata.pop(DIGEST, None)
    if digest is None:
        if not old:
            raise ValueError("it has no digest")
        unchecked(path)
    elif digest != digest_of(metadata, tensors):
        raise ValueError("it was changed after it was written: its digest is another one")
    return Stored(tensors, metadata, digest)


def write_saved(card_path: Path, tensors_path: Path, card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and the card that says what they are and whose they are; `read_saved` reads both."""
    digest = write_tensors(tensors_path, tensors)
    write_whole(card_path, json.dumps(sealed({**card, TENSORS: digest}), indent=1))


def read_saved(
    card_path: Path,
    tensors_path: Path,
    remedy: str,
    optional: Sequence[str] = (),
    **fields: type | tuple[type, ...],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A card and the weights of the model that it describes.

    Raises:
        InputError: where one of them is damaged, they do not belong together, or weights are NaN or infinite; see `read_card`.
        OSError: where one cannot be read.
    """
    card = read_card(card_path, remedy, optional, **fields)
    try:
        tensors = tensors_of(card, card_path, tensors_path)
    except ValueError as error:
        raise InputError(f"{tensors_path}: is damaged ({error}); {remedy}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{tensors_path}: {name} holds NaN or infinite numbers; {remedy}")
    return card, tensors


def tensors_of(card: Mapping[str, Any], card_path: Path, tensors_path: Path) -> dict[str, Tensor]:
    """The tensors that a card was written with.

    Raises:
        ValueError: where they are others, or damaged.
        OSError: where they cannot be read.
    """
    stored = read_tensors(tensors_path)
    if card.get(TENSORS, stored.digest) != stored.digest:
        raise ValueError(f"it is not what {card_path.name} was written with")
    return stored.tensors


def digest_of(content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """Of all that a file holds; each part says how long it is, so that none can pass for the end of another."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors or {}):
        tensor = (tensors or {})[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def unchecked(where: object) -> None:
    """Tell that a file was written before there were digests."""
    warnings.warn(
        f"{where} was written before cenote kept digests: whether it is as it was written cannot be told",
        UncheckedWarning,
        stacklevel=3,
    )


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
        ...     write_whole(path, json.dumps(sealed({"dim": "8"})))
        ...     read_card(path, "save it again", dim=int)
        Traceback (most recent call last):
        cenote.core.errors.InputError: ...card.json: is damaged (dim: expected int, got '8'); save it again
    """
    try:
        card = read_json(path)
        problem = None if isinstance(card, dict) else f"expected an object, got {type(card).__name__}"
        card = card if problem else opened(card, path)
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({error}); {remedy}") from error
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
