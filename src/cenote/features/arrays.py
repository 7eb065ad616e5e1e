"""One array in a file, known by its header and read in blocks: no file is ever held whole.

Nothing here unpickles.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cenote.core import InputError
from cenote.core.memory import MAX_ITEM_SIZE

DENSEST = 20
"""How many times its bytes on disk a file may take whatever it is: what was compressed in earnest grows by less."""
_most: ContextVar[int] = ContextVar("most", default=MAX_ITEM_SIZE)
BLOCK_BYTES = 4 * 2**20
LONGEST_HEADER = 100_000_000
"""Bytes, of a safetensors file, as its own library has it."""
MOST = 2**56
"""Numbers in an array: no disk holds more, and torch cannot count further."""
SUFFIXES = (".npy", ".npz", ".safetensors", ".h5", ".hdf5", ".pt", ".pth")
USUAL_NAMES = ("features", "x", "tokens", "embeddings", "feats", "vectors")
_TORCH = {
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}
_SAFETENSORS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@contextmanager
def limited(most: int) -> Iterator[None]:
    """What a file holds may take so many bytes in memory, for as long as this lasts: a file of a few kB can claim any size."""
    token = _most.set(most)
    try:
        yield
    finally:
        _most.reset(token)


def require_affordable(path: Path, taken: int) -> None:
    """Raise `Unusable` where what a file claims to hold takes more than it may, and far more than the file does."""
    size = path.stat().st_size
    if taken > max(_most.get(), DENSEST * size):
        raise Unusable(
            f"would take {taken / 1e9:,.1f} GB in memory, of {size:,} bytes on disk; the limit is {_most.get() / 1e9:.1f} GB, "
            f"see max_item_size"
        )


class Unusable(Exception):
    """A file that cannot be used; the message says why and what to do, without naming the file."""


@dataclass(frozen=True)
class StoredArray:
    """An array of floats on disk.

    Attributes:
        shape: as stored.
        dtype: float16, bfloat16, float32 or float64.
        blocks: reads it along its first axis, a few megabytes at a time; raises `Unusable` where the file ends early.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Tensor]]


@contextmanager
def told() -> Iterator[None]:
    """Whatever a library raises over a file inside, as `Unusable`: what it makes of a damaged one is not listed anywhere."""
    try:
        yield
    except (Unusable, InputError):
        raise
    except OSError as error:
        raise Unusable(f"cannot be read ({_first_line(error)}); write it again") from error
    except Exception as error:
        raise Unusable(f"is damaged ({_first_line(error)}); write it again") from error


def _whole(read: Callable[..., NDArray[Any]], *given: Any) -> NDArray[Any]:
    with told():
        return read(*given)


def _stored(shape: tuple[int, ...], dtype: torch.dtype, blocks: Callable[[], Iterator[Tensor]]) -> StoredArray:
    """An array whose shape a file claims, and whose failures are told."""

    def safely() -> Iterator[Tensor]:
        with told():
            yield from blocks()

    if not all(0 <= n < MOST for n in shape) or math.prod(shape) >= MOST:
        raise Unusable(f"claims a shape of {list(shape)[:8]}; write it again")
    return StoredArray(shape, dtype, safely)


@told()
def open_array(path: Path, name: str | None = None) -> StoredArray:
    """The array of floats in a file.

    Args:
        path: `.npy`, `.npz`, `.safetensors`, `.h5`, `.hdf5`, `.pt` or `.pth`.
        name: which array, where a file holds several; default: the only one, or one called features, x, tokens, ...

    Raises:
        Unusable: where the file is damaged, needs unpickling, or does not hold such an array.
    """
    match path.suffix.lower():
        case ".npy":
            found = _npy(path)
        case ".npz":
            found = _npz(path, name)
        case ".safetensors":
            found = _safetensors(path, name)
        case ".h5" | ".hdf5":
            found = _hdf5(path, name)
        case _:
            found = _torch(path, name)
    require_affordable(path, math.prod(found.shape) * found.dtype.itemsize)
    return found


@told()
def whole_arrays(path: Path) -> dict[str, Callable[[], NDArray[Any]]]:
    """The arrays of a file by name, each read whole when it is called; an array without a name has the name `""`.

    Raises:
        Unusable: where the file, or then the array, is damaged or needs unpickling.
    """
    match path.suffix.lower():
        case ".npy":
            return {"": partial(_whole, _whole_npy, path)}
        case ".npz":
            return {name: partial(npz_values, path, name) for name in npz_members(path)}
        case ".safetensors":
            return {name: partial(_whole, _whole_safetensors, path, name) for name in _safetensors_header(path)[0]}
        case ".h5" | ".hdf5":
            return {name: partial(_whole, _whole_hdf5, path, name) for name in _hdf5_datasets(path)}
        case _:
            held = _load_torch(path)
            tensors = held if isinstance(held, dict) else {"": held}
            return {str(k): partial(_whole, _as_numpy, v) for k, v in tensors.items() if isinstance(v, Tensor)}


@told()
def fill(part: Tensor, stored: StoredArray) -> None:
    """Copy a stored array into its place, in the type of that place.

    Raises:
        Unusable: where the file ends early or the numbers are not finite.
    """
    start = 0
    for block in stored.blocks():
        place = part[start : start + len(block)]
        place.copy_(block)
        if not place.isfinite().all():
            row = start + int((~place.isfinite().flatten(1).all(1)).nonzero()[0])
            raise Unusable(f"holds NaN or infinite numbers, first in row {row}; leave it out or compute it again")
        start += len(block)


def common_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """What arrays of these types are kept as: the type itself where all agree and it is not float64, else float32."""
    only = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return torch.float32 if only == torch.float64 else only


def rows_per_block(shape: tuple[int, ...], itemsize: int) -> int:
    """How many entries of the first axis make a block."""
    return max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * itemsize))


@told()
def npz_members(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array of an `.npz`, from the headers alone."""
    found = {}
    with _zip(path) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as file:
                    shape, _, dtype = _npy_header(cast(io.BufferedIOBase, file))
                    found[member.removesuffix(".npy")] = (shape, dtype)
    return found


@told()
def npz_array(path: Path, name: str) -> StoredArray:
    """One array of floats of an `.npz`; a compressed one is decompressed block by block."""
    with _zip(path) as archive, archive.open(f"{name}.npy") as file:
        shape, fortran, dtype = _npy_header(cast(io.BufferedIOBase, file))
        held, expected = archive.getinfo(f"{name}.npy").file_size, file.tell() + _bytes(shape, dtype)
    _check_numpy_floats(dtype)
    if held < expected:
        raise Unusable(f"is truncated: {held:,} of {expected:,} bytes are there; write it again")
    require_affordable(path, expected)

    def blocks() -> Iterator[Tensor]:
        if fortran:
            with np.load(path, allow_pickle=False) as arrays:
                yield from _slices(arrays[name])
            return
        with _zip(path) as archive, archive.open(f"{name}.npy") as member:
            file = cast(io.BufferedIOBase, member)
            _npy_header(file)
            yield from _read_blocks(file, shape, dtype)

    return _stored(shape, _TORCH[dtype.newbyteorder("=")], blocks)


def npz_values(path: Path, name: str) -> NDArray[Any]:
    """A small array of an `.npz`, whole: labels, ids, masks."""
    shape, dtype = npz_members(path).get(name, ((0,), np.dtype(np.uint8)))
    require_affordable(path, _bytes(shape, dtype))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except Exception as error:  # of the archive, its compression, or the array in it
        raise Unusable(f"array {name!r} cannot be read ({_first_line(error)})") from error


def _npy(path: Path) -> StoredArray:
    with path.open("rb") as file:
        shape, fortran, dtype = _npy_header(file)
        start = file.tell()
    _check_numpy_floats(dtype)
    _check_size(path, start + _bytes(shape, dtype))

    def blocks() -> Iterator[Tensor]:
        if fortran:
            yield from _slices(np.load(path, mmap_mode="r", allow_pickle=False))
            return
        with path.open("rb") as file:
            file.seek(start)
            yield from _read_blocks(file, shape, dtype)

    return _stored(shape, _TORCH[dtype.newbyteorder("=")], blocks)


def _npy_header(file: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except OSError:
        raise
    except Exception as error:  # headers are read as Python, which fails in more ways than one can list
        raise Unusable(f"is not a whole .npy array ({_first_line(error)}); write it again with numpy.save") from error
    return shape, fortran and len(shape) > 1, dtype


def _npz(path: Path, name: str | None) -> StoredArray:
    members = npz_members(path)
    objects = [key for key, (_, dtype) in members.items() if dtype.hasobject]
    if objects and (name in objects or len(objects) == len(members)):
        _check_numpy_floats(members[objects[0]][1])
    shapes = {key: shape for key, (shape, dtype) in members.items() if dtype.kind == "f"}
    return npz_array(path, _choose(shapes, list(members), name))


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise Unusable(f"is not a whole .npz archive ({error}); write it again with numpy.savez") from error


def _safetensors(path: Path, name: str | None) -> StoredArray:
    entries, head = _safetensors_header(path)
    chosen = _choose({k: e[0] for k, e in entries.items() if e[1] in _SAFETENSORS}, list(entries), name)
    shape, kind, begin, end = entries[chosen]
    if end - begin != math.prod(shape) * _SAFETENSORS[kind].itemsize:
        raise Unusable("has a safetensors header that contradicts itself; write it again")
    start = 8 + head + begin
    _check_size(path, 8 + head + max(entry[3] for entry in entries.values()))
    dtype = np.dtype(np.uint16) if kind == "BF16" else np.dtype(f"<f{_SAFETENSORS[kind].itemsize}")

    def blocks() -> Iterator[Tensor]:
        with path.open("rb") as file:
            file.seek(start)
            for block in _read_blocks(file, shape, dtype):
                yield block.view(_SAFETENSORS[kind])

    return _stored(shape, _SAFETENSORS[kind], blocks)


def _safetensors_header(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], str, int, int]], int]:
    """Shape, type, begin and end of each array, and how long the header is."""
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        if head > min(path.stat().st_size - 8, LONGEST_HEADER):
            raise Unusable("is not a whole safetensors file; write it again")
        try:
            header = json.loads(file.read(head))
            return {k: _entry(v) for k, v in header.items() if k != "__metadata__"}, head
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Unusable("has no safetensors header; write it again") from error


def _whole_safetensors(path: Path, name: str) -> NDArray[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _as_numpy(file.get_tensor(name))
    except SafetensorError as error:
        raise Unusable(f"is not a whole safetensors file ({_first_line(error)}); write it again") from error


def _entry(raw: dict[str, Any]) -> tuple[tuple[int, ...], str, int, int]:
    begin, end = raw["data_offsets"]
    numbers = (*raw["shape"], begin, end)
    if not all(type(n) is int and n >= 0 for n in numbers) or begin > end:
        raise ValueError(f"expected whole numbers from 0, got {numbers}")
    return tuple(raw["shape"]), str(raw["dtype"]), begin, end


def _hdf5(path: Path, name: str | None) -> StoredArray:
    h5py = _h5py()
    datasets = _hdf5_datasets(path)
    shapes = {key: shape for key, (shape, dtype) in datasets.items() if dtype.kind == "f"}
    chosen = _choose(shapes, list(datasets), name)
    shape, dtype = datasets[chosen]
    _check_numpy_floats(dtype)

    def blocks() -> Iterator[Tensor]:
        with h5py.File(path, "r") as file:
            yield from _slices(file[chosen])

    return _stored(shape, _TORCH[dtype.newbyteorder("=")], blocks)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise Unusable("needs h5py; install it with: pip install 'cenote[hdf5]'") from error
    return h5py


def _hdf5_datasets(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array, in groups or not."""
    h5py = _h5py()
    found = {}

    def visit(key: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.shape is not None:
            if node.external or node.is_virtual:
                raise Unusable(f"has its array {key!r} in other files; copy the numbers into this one")
            found[key] = (tuple(node.shape), node.dtype)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def _whole_hdf5(path: Path, name: str) -> NDArray[Any]:
    with _h5py().File(path, "r") as file:
        require_affordable(path, file[name].nbytes)
        return np.asarray(file[name][()])


def _torch(path: Path, name: str | None) -> StoredArray:
    def tensor() -> tuple[Tensor, str | None]:
        held = _load_torch(path)
        if isinstance(held, Tensor):
            return held, None
        if not isinstance(held, dict):
            raise Unusable(f"holds a {type(held).__name__}; expected a tensor or a dict of tensors")
        tensors = {str(k): v for k, v in held.items() if isinstance(v, Tensor)}
        shapes = {k: tuple(v.shape) for k, v in tensors.items() if v.is_floating_point()}
        chosen = _choose(shapes, [str(k) for k in held], name)
        return tensors[chosen], chosen

    found, _ = tensor()
    if found.dtype not in (*_TORCH.values(), torch.bfloat16):
        raise Unusable(f"holds {found.dtype}; expected float16, bfloat16, float32 or float64: use tensor.float()")
    shape = tuple(found.shape)

    def blocks() -> Iterator[Tensor]:
        values = tensor()[0].detach()
        rows = rows_per_block(shape, values.element_size())
        yield from (values[i : i + rows] for i in range(0, len(values), rows))

    return _stored(shape, found.dtype, blocks)


def _as_numpy(values: Tensor) -> NDArray[Any]:
    values = values.detach()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _whole_npy(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, EOFError, SyntaxError) as error:
        raise Unusable(f"is not a whole .npy array ({_first_line(error)}); write it again with numpy.save") from error


def _load_torch(path: Path) -> Any:
    import pickle

    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise Unusable(
            "holds Python objects that would need unpickling, which may run code; "
            "save the tensor alone with torch.save(tensor) or as safetensors"
        ) from error
    except OSError:
        raise
    except Exception as error:  # what a file of another kind makes of the unpickler is not listed anywhere
        raise Unusable(f"is not a whole .pt file ({_first_line(error)}); write it again") from error
    for value in held.values() if isinstance(held, dict) else [held]:
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta or value.is_quantized):
            raise Unusable("holds a sparse, quantised or empty tensor; save tensor.to_dense() or tensor.dequantize()")
    return held


def _choose(floats: dict[str, tuple[int, ...]], everything: list[str], name: str | None) -> str:
    if name is not None:
        if name in floats:
            return name
        if name in everything:
            raise Unusable(f"array {name!r} does not hold floats; save it as float32 or float16")
        raise Unusable(f"has no array {name!r}; it holds {', '.join(everything) or 'none'}")
    if not everything:
        raise Unusable("holds no array")
    if not floats:
        raise Unusable(f"holds no array of floats, only {', '.join(everything)}; save float32 or float16")
    tables = {key: shape for key, shape in floats.items() if len(shape) == 2} or floats
    usual = [key for key in USUAL_NAMES if key in tables]
    if len(tables) > 1 and not usual:
        raise Unusable(f"holds several arrays, {', '.join(tables)}; say which with vector_column")
    return usual[0] if len(tables) > 1 else next(iter(tables))


def _check_numpy_floats(dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise Unusable(
            "holds Python objects, which would need unpickling; save a plain array of floats "
            "(items of different lengths: one file each, or x [total, dim] with offsets)"
        )
    if dtype.newbyteorder("=") not in _TORCH:
        raise Unusable(f"holds {dtype}; expected float16, float32 or float64: use array.astype('float32')")


def _bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size < expected:
        raise Unusable(f"is truncated: {size:,} of {expected:,} bytes are there; write it again")


def _read_blocks(file: io.BufferedIOBase, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Tensor]:
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    rows = rows_per_block(shape, dtype.itemsize)
    for i in range(0, shape[0] if row_bytes else 0, rows):
        wanted = min(rows, shape[0] - i)
        block = np.frombuffer(_exactly(file, wanted * row_bytes), dtype).reshape(wanted, *shape[1:])
        yield torch.from_numpy(block.astype(dtype.newbyteorder("="), copy=False))


def _exactly(file: io.BufferedIOBase, count: int) -> bytearray:
    buffer = bytearray(count)
    filled = 0
    try:
        with memoryview(buffer) as view:
            while filled < count:
                got = file.readinto(view[filled:])
                if not got:
                    raise Unusable(f"is truncated: it ends {count - filled:,} bytes early; write it again")
                filled += got
    except (EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Unusable(f"is damaged ({_first_line(error)}); write it again") from error
    return buffer


def _slices(array: Any) -> Iterator[Tensor]:
    rows = rows_per_block(array.shape, array.dtype.itemsize)
    for i in range(0, array.shape[0], rows):
        block = np.array(array[i : i + rows], dtype=array.dtype.newbyteorder("="), order="C")
        yield torch.from_numpy(block)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
