"""Shards of a feature store: plain Arrow files, each written in one step, each carrying its checksum in its name.

`part-000012-9f86d081884c7d65.arrow` is shard 12; the rest of the name starts the SHA-256 of its bytes. So which shards are
finished, and whether they are whole, can be told from the folder alone, whoever wrote them and in whatever order.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.features.store.manifest import Dtype, ShardEntry
from cenote.features.store.pages import Collected

SHARDS = "shards"
NAME = re.compile(r"part-(\d{6,})-([0-9a-f]{16})\.arrow")
UNFINISHED = ".unfinished-"
HASHED = 16
SCRATCH, WORTH_A_THREAD = 2**20, 2**16
DTYPES: dict[Dtype, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Rows:
    """What goes into one shard.

    Attributes:
        ids: names of the items.
        inputs: per item the digest of the raw bytes that it was computed from.
        starts, lengths: per item where its tokens begin among the collected ones, and how many they are.
        tokens: of all items, in any order.
        skipped: items left out, and why.
        shortened: how many items were cut to the model's longest input.
    """

    ids: Sequence[str]
    inputs: Sequence[bytes]
    starts: Sequence[int]
    lengths: Sequence[int]
    tokens: Collected
    skipped: Sequence[tuple[str, str]] = ()
    shortened: int = 0


@dataclass(frozen=True)
class ShardFile:
    """A finished shard in a folder."""

    path: Path
    number: int
    digest: str

    def whole(self) -> bool:
        """Whether its bytes are those that were written; reads all of them."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest().startswith(self.digest)


def layer_column(layer: int) -> str:
    """Name of the column with the tokens of one layer."""
    return f"layer_{layer:02d}"


def finished_shards(store: Path) -> dict[int, ShardFile]:
    """The finished shards by their numbers, from the names in the folder.

    Raises:
        InputError: where two different files claim to be the same shard.
    """
    found: dict[int, ShardFile] = {}
    folder = store / SHARDS
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match is None:
            continue
        shard = ShardFile(path, int(match[1]), match[2])
        if shard.number in found:
            raise InputError(
                f"{folder}: {found[shard.number].path.name} and {path.name} are the same shard with different content; "
                f"delete both and run the same cenote extract again"
            )
        found[shard.number] = shard
    return found


def write_shard(store: Path, number: int, key: str, rows: Rows, dtype: Dtype) -> ShardEntry:
    """Write a shard so that it is either whole or not there.

    Args:
        store: the store's folder.
        number: of the shard.
        key: `Manifest.key()`, kept in the file.
        rows: what goes in.
        dtype: the store's.

    Raises:
        InputError: where the disk is full.
    """
    import pyarrow as pa

    folder = store / SHARDS
    folder.mkdir(parents=True, exist_ok=True)
    offsets = pa.array(np.concatenate([[0], np.cumsum(rows.lengths, dtype=np.int64)]).astype(np.int64))
    columns = {
        "id": pa.array(list(rows.ids), pa.string()),
        "input": pa.array(list(rows.inputs), pa.binary()),
    }
    layers = _Layers(rows, dtype)
    for layer in rows.tokens.layers:
        columns[layer_column(layer)] = pa.LargeListArray.from_arrays(offsets, layers.vectors(layer))
    about = {
        "cenote.key": key,
        "cenote.shard": str(number),
        "cenote.dtype": dtype,
        "cenote.skipped": json.dumps([list(s) for s in rows.skipped]),
        "cenote.shortened": str(rows.shortened),
    }
    batch = pa.record_batch(columns).replace_schema_metadata(about)
    temporary = folder / f"{UNFINISHED}{number:06d}-{os.uname().nodename}-{os.getpid()}"
    try:
        with temporary.open("wb") as raw, ThreadPoolExecutor(1) as beside:
            file = _Hashed(raw, layers, beside)
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            raw.flush()
            os.fsync(raw.fileno())
        digest = file.digest.hexdigest()
        path = folder / f"part-{number:06d}-{digest[:HASHED]}.arrow"
        os.replace(temporary, path)
        _sync_folder(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = os.statvfs(folder)
        raise InputError(
            f"{folder}: shard {number} of {batch.nbytes:,} bytes could not be written ({error.strerror or error}; "
            f"{free.f_bavail * free.f_frsize:,} bytes are free); finished shards are kept: make room and run the same "
            f"command again"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return ShardEntry(
        path.name, digest, len(rows.ids), int(sum(rows.lengths)), file.written, len(rows.skipped), rows.shortened
    )


def open_shard(path: Path) -> Any:
    """The record batch of a shard, mapped, not read.

    Raises:
        InputError: where it is no whole Arrow file.
    """
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return reader.get_batch(0), reader.schema.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: {damaged(str(error).splitlines()[0])}") from error


def damaged(why: str) -> str:
    """What to say of a broken shard."""
    return f"is damaged ({why}); run the same cenote extract again: it makes this shard anew and keeps the others"


def vectors_of(batch: Any, layer: int, dtype: Dtype) -> tuple[Any, Tensor]:
    """Offsets `[rows + 1]` and tokens `[total, dim]` of one layer, in the mapped memory."""
    column = batch.column(layer_column(layer))
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    lists = column.values
    flat = lists.values.to_numpy(zero_copy_only=True)
    width = lists.type.list_size
    import warnings

    with warnings.catch_warnings():
        # mapped for reading only; nothing here writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        values = torch.from_numpy(flat.view(np.int16) if dtype == "bfloat16" else flat)
    return offsets, (values.view(torch.bfloat16) if dtype == "bfloat16" else values).view(-1, width)


def remove_unfinished(store: Path) -> int:
    """Delete what a killed run left half written; only for the one who holds the store's lock."""
    left = list((store / SHARDS).glob(f"{UNFINISHED}*"))
    # what was being put beside manifest.json, times.json and items.parquet, to take their place
    left += [
        file for pattern in (".manifest.json.*", ".times.json.*", ".items.parquet-*") for file in store.glob(pattern)
    ]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


class _Layers:
    """What stands for the tokens of each layer while Arrow lays out a shard.

    The tokens lie in pages, in another order. Arrow is given memory that nobody ever touches, so that takes nothing, and where
    it would write that to the file, the tokens are written piece by piece: they are never in one place, nor twice.
    """

    def __init__(self, rows: Rows, dtype: Dtype) -> None:
        import pyarrow as pa

        self.rows = rows
        # Arrow has no bfloat16: its 16 bits are kept as an unsigned number
        self.kind = {"float16": pa.float16(), "float32": pa.float32(), "bfloat16": pa.uint16()}[dtype]
        self.total = sum(rows.lengths)
        self.bytes = self.total * rows.tokens.pages.token
        self.memory = mmap.mmap(
            -1, max(self.bytes, 1) * len(rows.tokens.layers), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ
        )
        self.of_address: dict[int, int] = {}

    def vectors(self, layer: int) -> Any:
        """A column's values."""
        import pyarrow as pa

        begin = len(self.of_address) * self.bytes
        blank = pa.py_buffer(self.memory).slice(begin, self.bytes)
        if self.bytes:
            self.of_address[blank.address] = layer
        dim = self.rows.tokens.pages.dim
        return pa.FixedSizeListArray.from_arrays(pa.Array.from_buffers(self.kind, self.total * dim, [None, blank]), dim)

    def written_for(self, data: Any) -> Iterator[Any]:
        """What goes to the file where Arrow writes `data`."""
        layer = self.of_address.get(getattr(data, "address", 0))
        if layer is None:
            yield data
            return
        token = self.rows.tokens.pages.token
        scratch = np.empty((max(SCRATCH // token, 1), token), dtype=np.uint8)
        yield from self.rows.tokens.in_order(layer, self.rows.starts, self.rows.lengths, scratch)


class _Hashed:
    """A file that hashes what goes through it, so that nothing is read again; large pieces while they are written."""

    closed = False

    def __init__(self, file: IO[bytes], layers: _Layers, beside: Executor) -> None:
        self.file = file
        self.beside = beside
        self.layers = layers
        self.digest = hashlib.sha256()
        self.written = 0

    def write(self, data: Any) -> int:
        begin = self.written
        for piece in self.layers.written_for(data):
            size = piece.nbytes if isinstance(piece, np.ndarray) else len(piece)
            if size < WORTH_A_THREAD:
                self.digest.update(piece)
                self.file.write(piece)
            else:
                hashed = self.beside.submit(self.digest.update, piece)
                self.file.write(piece)
                # the next piece lies in the same place
                hashed.result()
            self.written += size
        return self.written - begin

    def tell(self) -> int:
        return self.written

    def flush(self) -> None:
        self.file.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        pass


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
