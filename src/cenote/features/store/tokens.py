"""Tokens that stay on disk: mapped shard files, read item by item, at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cenote.core import InputError
from cenote.features.store.manifest import Manifest, ShardEntry, read_manifest
from cenote.features.store.shards import DTYPES, ShardFile, damaged, finished_shards, open_shard, vectors_of


class StoredTokens:
    """The tokens of a complete store.

    Nothing but the lengths is in memory: batches are copied out of the mapped files, whose pages the system keeps or drops as
    it can. A shard's checksum is compared when its tokens are first read.

    Args:
        folder: of the store.

    Raises:
        InputError: where the store is not complete, a shard is lost, damaged or of another extraction.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        if self.manifest.shards is None:
            done = len(finished_shards(folder))
            raise InputError(
                f"{folder}: {done} of {self.manifest.shard_count} shards are finished; run the same cenote extract again, "
                f"it goes on where it stopped"
            )
        self._shards = [_Shard(folder, number, entry.file, self.manifest) for number, entry in enumerate(self._entries)]
        rows = np.array([0, *(entry.rows for entry in self._entries)])
        self._first_rows: NDArray[np.int64] = rows.cumsum()

    @property
    def _entries(self) -> tuple:  # type: ignore[type-arg]
        return self.manifest.shards or ()

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __reduce__(self) -> tuple[type[StoredTokens], tuple[Path]]:
        # another process maps the same files
        return StoredTokens, (self.folder.absolute(),)

    @cached_property
    def ids(self) -> list[str]:
        """Names of the items, skipped ones left out."""
        return [name for shard in self._shards for name in shard.ids()]

    @cached_property
    def inputs(self) -> list[bytes]:
        """Digests of the raw bytes that the items were computed from, see `cenote.features.raw.digest_of`."""
        return [digest for shard in self._shards for digest in shard.inputs()]

    @cached_property
    def lengths(self) -> Int[Tensor, "items"]:
        """Tokens per item."""
        return torch.from_numpy(np.concatenate([np.diff(shard.offsets) for shard in self._shards]))

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return DTYPES[self.manifest.dtype]

    def digest(self) -> str:
        """SHA-256 over the checksums of all shards."""
        return hashlib.sha256("".join(entry.sha256 for entry in self._entries).encode()).hexdigest()

    def item(self, index: int, layer: int) -> Float[Tensor, "tokens dim"]:
        """One layer of one item, in the mapped memory."""
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        row = index - int(self._first_rows[number])
        shard = self._shards[number]
        return shard.tokens(layer)[int(shard.offsets[row]) : int(shard.offsets[row + 1])]

    def gather(
        self, items: Int[Tensor, "chosen"], layers: Sequence[int]
    ) -> tuple[Float[Tensor, "chosen layers tokens dim"], Bool[Tensor, "chosen tokens"] | None]:
        """Some items, padded with zeros to the longest; the mask is `None` where nothing is padded."""
        lengths = self.lengths[items]
        longest = int(lengths.max()) if len(items) else 0
        ragged = bool((lengths != longest).any())
        shape = (len(items), len(layers), longest, self.manifest.dim)
        x = torch.zeros(shape, dtype=self.dtype) if ragged else torch.empty(shape, dtype=self.dtype)
        wanted = items.numpy()
        numbers = np.searchsorted(self._first_rows, wanted, side="right") - 1
        for number in np.unique(numbers).tolist():
            shard = self._shards[number]
            places = np.flatnonzero(numbers == number)
            rows = wanted[places] - self._first_rows[number]
            starts, ends = shard.offsets[rows].tolist(), shard.offsets[rows + 1].tolist()
            for at, layer in enumerate(layers):
                tokens = shard.tokens(layer)
                for place, start, end in zip(places.tolist(), starts, ends, strict=True):
                    x[place, at, : end - start] = tokens[start:end]
        return x, torch.arange(longest) < lengths.unsqueeze(1) if ragged else None


class _Shard:
    """One file, opened when it is needed."""

    def __init__(self, store: Path, number: int, name: str, manifest: Manifest) -> None:
        self.path = store / "shards" / name
        self.number = number
        self.manifest = manifest
        self._tokens: dict[int, Tensor] = {}
        if not self.path.is_file():
            raise InputError(f"{self.path}: is lost; run the same cenote extract again: it makes this shard anew")

    def ids(self) -> list[str]:
        return [str(name) for name in self._cells("id")]

    def inputs(self) -> list[bytes]:
        return [bytes(digest) for digest in self._cells("input")]

    @cached_property
    def _entry(self) -> ShardEntry:
        assert self.manifest.shards is not None
        return self.manifest.shards[self.number]

    @cached_property
    def _batch(self):  # type: ignore[no-untyped-def]
        batch, about = open_shard(self.path)
        if about.get(b"cenote.key", b"") != self.manifest.key().encode():
            raise InputError(f"{self.path}: is a shard of another store; take it out and run cenote extract again")
        if about.get(b"cenote.shard") != str(self.number).encode():
            raise InputError(f"{self.path}: is no shard {self.number}; take it out and run cenote extract again")
        if len(batch) != self._entry.rows:
            raise InputError(f"{self.path}: {damaged(f'it holds {len(batch)} of {self._entry.rows} items')}")
        return batch

    def _cells(self, name: str) -> list[Any]:
        import pyarrow as pa

        try:
            column = self._batch.column(name)
            column.validate(full=True)
            return list(column.to_pylist())
        except (pa.ArrowException, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: {damaged(str(error).splitlines()[0])}") from error

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        offsets = np.array(self._vectors(self.manifest.layers[0])[0], dtype=np.int64)
        # before they are asked for tokens, which lie in the same file
        whole = offsets[0] == 0 and offsets[-1] == self._entry.tokens and bool((np.diff(offsets) >= 0).all())
        if len(offsets) != self._entry.rows + 1 or not whole:
            raise InputError(f"{self.path}: {damaged('its items do not fill it')}")
        return offsets

    def _vectors(self, layer: int) -> tuple[NDArray[np.int64], Tensor]:
        try:
            return vectors_of(self._batch, layer, self.manifest.dtype)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: {damaged(str(error).splitlines()[0])}") from error

    def tokens(self, layer: int) -> Float[Tensor, "total dim"]:
        if not self._tokens:
            self._check()
        if layer not in self._tokens:
            self._tokens[layer] = self._vectors(layer)[1]
        return self._tokens[layer]

    def _check(self) -> None:
        if not ShardFile(self.path, self.number, self._entry.sha256).whole():
            raise InputError(f"{self.path}: {damaged('its bytes do not match its checksum')}")
