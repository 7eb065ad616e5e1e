"""Arrow, Feather and Parquet files, and folders saved by `datasets`, with a column of lists of vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.core import InputError
from cenote.core.files import inside, read_json
from cenote.features import arrays
from cenote.features.source import Filled, LazyColumns, Source
from cenote.features.splits import WORDS
from cenote.features.table import ID_NAMES, SPLIT_NAME, Column, find
from cenote.features.token_labels import TOKEN_LABELS
from cenote.features.validate import Problems

ARROW, PARQUET = (".arrow", ".feather", ".ipc"), (".parquet", ".pq")
SUFFIXES = ARROW + PARQUET
BATCH_BYTES = 4 * 2**20
ROWS_AT_MOST = 65_536


@dataclass(frozen=True)
class Shard:
    """One file, and the split that its place in a saved folder gives it."""

    path: Path
    split: str | None = None


def shards_of(path: Path) -> list[Shard]:
    """The files of a data set: itself, those of a folder saved by `datasets`, or of a folder of such files; none otherwise."""
    if path.is_file():
        return [Shard(path)] if path.suffix.lower() in SUFFIXES else []
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits", [])
        if not isinstance(splits, list):
            raise InputError(f"{path / 'dataset_dict.json'}: names no list of splits; save the data set again")
        return [Shard(f, split) for split in splits for f in _saved(_within(path, split))]
    return [Shard(f, _split_in_name(f)) for f in _saved(path)]


def _saved(folder: Path) -> list[Path]:
    if (folder / "state.json").is_file():
        entries = _json(folder / "state.json").get("_data_files", [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "filename" in e for e in entries):
            raise InputError(f"{folder / 'state.json'}: names no files; save the data set again")
        return [_within(folder, entry["filename"]) for entry in entries]
    return sorted(f for f in folder.glob("*") if f.suffix.lower() in SUFFIXES)


def _within(folder: Path, name: object) -> Path:
    try:
        found = inside(folder, name)
    except ValueError as error:
        raise InputError(f"{folder}: {error}; save the data set again") from None
    if not found.exists():
        raise InputError(f"{folder}: {name} is lost; save the data set again")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is not JSON ({error}); save the data set again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object; save the data set again")
    return found


def _split_in_name(path: Path) -> str | None:
    word = path.stem.replace("_", "-").split("-")[0].lower()
    return word if word in WORDS and not word.isdigit() else None


def open_arrow(shards: list[Shard], vector_column: str | None, id_column: str | None, where: Path) -> Source:
    """The items of Arrow or Parquet files that have the same columns.

    Args:
        shards: the files, in order.
        vector_column: the column of lists of vectors; default: the only one of that type.
        id_column: default `id`, ..., else items are numbered.
        where: for messages.

    Raises:
        InputError: where a file is not Arrow or Parquet, or there is no such column.
    """
    schema = File(shards[0].path).schema
    for shard in shards[1:]:
        other = File(shard.path).schema
        if other.names != schema.names:
            raise InputError(
                f"{shard.path}: its columns {', '.join(other.names)} differ from those of {shards[0].path.name}, "
                f"{', '.join(schema.names)}; put only files of one data set into a folder"
            )
    vectors = _vector_column(schema, vector_column, where)
    names = [field.name for field in schema if field.name != vectors and holds_cells(field.type)]
    if TOKEN_LABELS in schema.names and not _holds_whole_numbers(schema.field(TOKEN_LABELS).type):
        raise InputError(
            f"{where}: column {TOKEN_LABELS} is {schema.field(TOKEN_LABELS).type}; expected a list of whole numbers per item, "
            f"list<int64>, one per token"
        )

    def read(name: str) -> Column:
        if name == SPLIT_NAME and name not in names:
            return [shard.split for shard in shards for _ in range(File(shard.path).rows())]
        return [cell for shard in shards for column in File(shard.path).batches(name) for cell in column.to_pylist()]

    known_split = all(shard.split is not None for shard in shards)
    columns = LazyColumns([*names, *([SPLIT_NAME] if known_split and SPLIT_NAME not in names else [])], read)
    id_name = find(dict.fromkeys(names, ()), id_column, ID_NAMES, "id_column")
    if id_name is None:
        ids = [str(i) for i in range(sum(File(shard.path).rows() for shard in shards))]
    else:
        ids = ["" if cell is None else str(cell) for cell in columns[id_name]]
    kind = "Parquet" if shards[0].path.suffix.lower() in PARQUET else "Arrow"
    return Source(
        f"{kind}, {len(shards)} file{'s' if len(shards) > 1 else ''}",
        ids,
        columns,
        lambda found: _load(shards, vectors, ids, found),
        class_names=class_names(schema),
        used=frozenset() if id_name is None else frozenset({id_name}),
    )


def _load(shards: list[Shard], vectors: str, ids: list[str], problems: Problems) -> Filled | None:
    """Fill one flat tensor with the numbers of all files, batch by batch, then give it its width."""
    bound = 0
    for shard in shards:
        numbers = File(shard.path).numbers_at_most(vectors)
        try:
            arrays.require_affordable(shard.path, 4 * numbers)
        except arrays.Unusable as error:
            raise InputError(f"{shard.path}: {error}") from error
        bound += numbers
    flat: torch.Tensor | None = None
    lengths: list[int] = []
    dim = filled = 0
    for shard in shards:
        for column in File(shard.path).batches(vectors):
            batch = _Batch.of(column)
            first = len(lengths)
            lengths += batch.lengths.tolist()
            for i in np.flatnonzero(batch.lengths == 0).tolist():
                problems.add("empty", f"item {ids[first + i]!r} has no tokens; leave it out")
            if not len(batch.widths):
                continue
            dim = dim or int(next(iter(batch.widths[batch.widths > 0]), 0))
            owner = first + np.repeat(np.arange(len(batch.lengths)), batch.lengths)
            for i in np.unique(owner[batch.widths != dim]).tolist():
                odd = sorted(set(batch.widths[owner == i].tolist()) - {dim})
                problems.add(
                    "width",
                    f"item {ids[i]!r} has vectors of width {odd[0]}, but the first item's have {dim}; "
                    f"use one model for all, or take it out",
                )
            finite = np.isfinite(batch.numbers)
            if not finite.all():
                token = np.repeat(owner, batch.widths)
                for i in np.unique(token[~finite]).tolist():
                    problems.add(
                        "not finite",
                        f"item {ids[i]!r} holds NaN, infinite or missing numbers; leave it out or compute it again",
                    )
            if len(problems):
                continue
            if flat is None:
                kept = torch.float16 if batch.numbers.dtype == np.float16 else torch.float32
                flat = torch.empty(bound, dtype=kept)
            np.copyto(flat.numpy()[filled : filled + len(batch.numbers)], batch.numbers, casting="same_kind")
            filled += len(batch.numbers)
    if flat is None or len(problems):
        return None
    return Filled(flat[:filled].view(sum(lengths), dim), lengths)


@dataclass(frozen=True)
class _Batch:
    """A piece of a column: tokens per item, width per token, all numbers."""

    lengths: NDArray[np.int64]
    widths: NDArray[np.int64]
    numbers: NDArray[Any]

    @classmethod
    def of(cls, column: Any) -> _Batch:
        lengths, tokens = _unnested(column)
        widths, flat = _unnested(tokens)
        numbers = flat.to_numpy(zero_copy_only=False)
        if numbers.dtype == np.float64:
            # what float32 cannot hold becomes infinite, and is found as such
            with np.errstate(over="ignore"):
                numbers = numbers.astype(np.float32)
        return cls(lengths, widths, numbers)


def _unnested(column: Any) -> tuple[NDArray[np.int64], Any]:
    """Lengths of the lists in a column, 0 for a missing one, and what they hold."""
    import pyarrow.compute as pc

    column = getattr(column, "storage", column)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), column.flatten()


class File:
    """One file: its schema, its rows, and each column batch by batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_parquet = path.suffix.lower() in PARQUET
        with told(self.path):
            self.schema = self._parquet().schema_arrow if self.is_parquet else self._ipc().schema
            names = self.schema.names
        if len(set(names)) < len(names):
            raise InputError(f"{path}: names a column twice: {', '.join(names)}; give each a name of its own")

    def rows(self) -> int:
        """Number of items."""
        if self.is_parquet:
            with told(self.path):
                return int(self._parquet().metadata.num_rows)
        return sum(len(batch) for batch in self.batches(self.schema.names[0]))

    def numbers_at_most(self, column: str) -> int:
        """No fewer than the numbers in the lists of a column: Parquet counts an empty or missing list as one."""
        if not self.is_parquet:
            return sum(len(_unnested(_unnested(batch)[1])[1]) for batch in self.batches(column))
        with told(self.path):
            metadata = self._parquet().metadata
            chunks = (
                metadata.row_group(g).column(c)
                for g in range(metadata.num_row_groups)
                for c in range(metadata.row_group(g).num_columns)
            )
            return sum(int(c.num_values) for c in chunks if c.path_in_schema.startswith(f"{column}."))

    def batches(self, column: str) -> Iterator[Any]:
        """The pieces of one column."""
        with told(self.path):
            if not self.is_parquet:
                reader = self._ipc()
                stored = getattr(reader, "num_record_batches", None)
                records = reader if stored is None else (reader.get_batch(i) for i in range(stored))
            else:
                file = self._parquet()
                rows = BATCH_BYTES // 4 * file.metadata.num_rows // max(1, self.numbers_at_most(column))
                rows = min(max(1, rows), ROWS_AT_MOST)
                records = file.iter_batches(batch_size=rows, columns=[column], use_threads=False)
            for record in records:
                cells = record.column(column)
                cells.validate(full=True)
                yield cells

    def _parquet(self) -> Any:
        import pyarrow.parquet as pq

        # without these pyarrow holds a whole row group, which often is the whole file
        return pq.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False)

    def _ipc(self) -> Any:
        import pyarrow as pa

        # all columns of a mapped file cost nothing, while included_fields would copy the chosen ones
        mapped = pa.memory_map(str(self.path))
        try:
            return pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_stream(mapped)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Failures of pyarrow inside, in words that name the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "Parquet" if path.suffix.lower() in PARQUET else "Arrow"
        why = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: is not a whole {kind} file ({why}); write it again") from error


def _vector_column(schema: Any, wanted: str | None, where: Path) -> str:
    typed = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is not None:
        if wanted not in schema.names:
            raise InputError(f"vector_column: {where} has no column {wanted!r}; its columns are {typed}")
        if not _holds_vectors(schema.field(wanted).type):
            raise InputError(
                f"vector_column: {wanted!r} of {where} is {schema.field(wanted).type}; expected a list of vectors per item, "
                f"list<list<float>>"
            )
        return wanted
    found = [field.name for field in schema if _holds_vectors(field.type)]
    if len(found) != 1:
        what = "no column" if not found else f"several columns ({', '.join(found)})"
        raise InputError(
            f"vector_column: {where} has {what} of lists of vectors, list<list<float>>; its columns are {typed}; "
            + ("name one" if found else "save float vectors, one list of them per item")
        )
    return found[0]


def _depth(kind: Any) -> int:
    return 0 if _inside(kind) is None else 1 + _depth(_inside(kind))


def _inside(kind: Any) -> Any:
    """The type in a list type; `None` where it is no list."""
    import pyarrow as pa

    kind = getattr(kind, "storage_type", kind)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _leaf(kind: Any) -> Any:
    return kind if _inside(kind) is None else _leaf(_inside(kind))


def _holds_vectors(kind: Any) -> bool:
    import pyarrow as pa

    return _depth(kind) == 2 and pa.types.is_floating(_leaf(kind))


def _holds_whole_numbers(kind: Any) -> bool:
    import pyarrow as pa

    leaf = _leaf(kind)
    return _depth(kind) == 1 and (pa.types.is_integer(leaf) or pa.types.is_boolean(leaf))


def holds_cells(kind: Any) -> bool:
    """Whether a column may hold labels, ids, groups: single numbers or texts, or lists of them."""
    import pyarrow as pa

    t, leaf = pa.types, _leaf(kind)
    if t.is_dictionary(leaf):
        leaf = leaf.value_type
    is_text = t.is_string(leaf) or t.is_large_string(leaf) or t.is_string_view(leaf)
    return _depth(kind) < 2 and (is_text or t.is_boolean(leaf) or t.is_integer(leaf) or t.is_floating(leaf))


def huggingface_features(schema: Any) -> dict[str, Any]:
    """What `datasets` keeps beside the schema: the kind of each column; empty where it is not there."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return dict(features.items())
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def class_names(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of `ClassLabel` columns."""
    labels = {
        name: f.get("feature", f) if isinstance(f, dict) else f for name, f in huggingface_features(schema).items()
    }
    return {
        name: [str(n) for n in f["names"]]
        for name, f in labels.items()
        if isinstance(f, dict) and f.get("_type") == "ClassLabel" and isinstance(f.get("names"), list)
    }
