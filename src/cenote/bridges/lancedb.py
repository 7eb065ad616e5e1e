"""LanceDB as a store of many vectors per document: its candidates, re-scored by exact MaxSim.

```python
from cenote.bridges.lancedb import LanceStore

store = LanceStore("index", Meta("model", 384, "hierarchical", 4.0))
store.add(ids, bags)
store.train()
store.search(queries, k=10)
```

Without the second step, scores of tokens that the index did not look at are guesses, and a third of the true first ten is
missed; with it they are exact, and only what was no candidate can be missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cenote.core.files as files
from cenote.core import Bags, InputError
from cenote.core.maxsim import search
from cenote.core.requirements import require_at_least
from cenote.features.vectors import Hits, Meta, disk_bytes, opened_meta, require_vectors, require_width

CANDIDATES = 100
TRAINED_FROM = 2**14
"""Vectors below which a scan of all is quick."""
TRAINING = 5
"""Rounds of training; fifty, the library's own number, took minutes on one core and found no more."""
AT_ONCE = 500
"""Ids in one condition."""
TABLE, FOLDER = "vectors", "lance"


class LanceStore:
    """Vectors of half precision in LanceDB, compared by cosine, the only measure that it has for many vectors.

    Args:
        folder: of the index.
        meta: what it is to hold; default: what it holds. Raw means are refused: cosine would scale them.
        candidates: documents that are scored exactly, of each query.

    Raises:
        InputError: where it holds something else, is not there, or lancedb is not installed.
    """

    def __init__(self, folder: str | Path, meta: Meta | None = None, candidates: int = CANDIDATES) -> None:
        require_at_least(1, candidates=candidates)
        lancedb = _library()
        self.folder, self.candidates = Path(folder), candidates
        if meta is not None and not meta.unit_norm:
            raise InputError(
                "store: LanceDB compares by cosine, which would scale raw means to norm 1; take a reducer of unit norm, or "
                "exact:// or qdrant://"
            )
        self._meta = opened_meta(self.folder, meta)
        connection = lancedb.connect(str(self.folder / FOLDER))
        self._schema = _schema(self._meta.width)
        self._table = connection.create_table(TABLE, schema=self._schema, exist_ok=True)

    @property
    def meta(self) -> Meta:
        """What it holds."""
        return self._meta

    @property
    def nbytes(self) -> int:
        """That it takes on disk, older versions that LanceDB keeps included."""
        return disk_bytes(self.folder)

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those that are not in it, in their order."""
        there: set[str] = set()
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            found = self._table.search().where(_among(some)).select(["id"]).limit(len(some)).to_arrow()
            there |= set(found["id"].to_pylist())
        return [name for name in ids if name not in there]

    def add(self, ids: Sequence[str], bags: Bags) -> int:
        """Add documents, but those whose id is there already: all or, where that is cut short, none.

        Raises:
            InputError: where vectors are not of norm 1, NaN, or of another width.
        """
        require_vectors(ids, bags, self.meta, unit=True)
        with files.alone(self.folder, "index"):
            self._table.checkout_latest()
            before = len(self)
            merge = self._table.merge_insert("id").when_not_matched_insert_all()
            merge.execute(_rows(ids, bags, self._schema))
            return len(self) - before

    def train(self, least: int = TRAINED_FROM) -> bool:
        """Build LanceDB's index of what is there, from so many vectors on; whether it was built.

        Below, and until then, all vectors are looked at.
        """
        vectors = sum(len(bags.values) for _, bags in self.batches())
        if vectors < least:
            return False
        import lancedb.index

        width = self.meta.width
        config = lancedb.index.IvfPq(
            distance_type="cosine",
            num_partitions=max(1, round(math.sqrt(vectors) / 4)),
            num_sub_vectors=next(n for n in range(max(1, width // 8), 0, -1) if width % n == 0),
            max_iterations=TRAINING,
        )
        with files.alone(self.folder, "index"):
            self._table.create_index("vectors", config=config, replace=True)
            self._table.wait_for_index([i.name for i in self._table.list_indices()])
        return True

    def search(self, bags: Bags, k: int = 10) -> Hits:
        """The best of LanceDB's candidates by exact MaxSim; `exact` where it looked at all documents to find them."""
        require_at_least(1, k=k)
        require_width(bags, self.meta)
        trained = bool(self._table.list_indices())
        names, scores = [], []
        for query in bags:
            asked = query.float().numpy()
            found = (
                self._table.search(asked, vector_column_name="vectors")
                .distance_type("cosine")
                .limit(max(self.candidates, k))
                .select(["id", "vectors", "_distance"])
                .to_arrow()
            )
            if not len(found):
                return Hits([[] for _ in range(len(bags))], torch.zeros(len(bags), 0))
            best = search(Bags.from_list([query.float()]), _bags(found), k)
            ids = found["id"].to_pylist()
            names.append([ids[n] for n in best.numbers[0].tolist()])
            scores.append(best.scores[0])
        shortest = min((len(s) for s in scores), default=0)
        scored = torch.stack([s[:shortest] for s in scores]) if scores else torch.zeros(0, 0)
        return Hits([row[:shortest] for row in names], scored, exact=not trained)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents; how many were there."""
        with files.alone(self.folder, "index"):
            self._table.checkout_latest()
            before = len(self)
            for start in range(0, len(ids), AT_ONCE):
                self._table.delete(_among(ids[start : start + AT_ONCE]))
            return before - len(self)

    def batches(self) -> Iterator[tuple[list[str], Bags]]:
        """Ids and vectors, in float32, of some documents after the other."""
        count = len(self)
        for start in range(0, count, AT_ONCE):
            found = self._table.search().select(["id", "vectors"]).limit(AT_ONCE).offset(start).to_arrow()
            yield found["id"].to_pylist(), _bags(found)


def place_of(address: str) -> tuple[Path, str]:
    """Folder and table of `FOLDER/TABLE`; the library is there.

    Raises:
        InputError: where one of them is not named, or lancedb is not installed.
    """
    folder, slash, table = address.rpartition("/")
    if not slash or not folder or not table:
        raise InputError(f"out: expected lancedb://FOLDER/TABLE, got lancedb://{address}")
    _library("out", "write .parquet or .npy")
    return Path(folder).expanduser(), table


def write_table(folder: Path, name: str, rows: Any) -> None:
    """Put an Arrow table with a column `id` into a table of a LanceDB folder, in the places of rows with the same ids.

    Raises:
        InputError: where the table holds other columns.
    """
    library = _library("out", "write .parquet or .npy")
    connection = library.connect(str(folder))
    try:
        table = connection.open_table(name)
    except ValueError:  # what it says of a table that is not there
        table = connection.create_table(name, schema=rows.schema)
    if table.schema.names != rows.schema.names or table.schema.types != rows.schema.types:
        held, wanted = (", ".join(f"{f.name} ({f.type})" for f in schema) for schema in (table.schema, rows.schema))
        raise InputError(f"out: the table {name} in {folder} holds {held}, expected {wanted}; name another")
    table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)


def _library(argument: str = "store", instead: str = "take exact://") -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise InputError(f"{argument}: lancedb is not installed; pip install 'cenote[index]', or {instead}") from error
    return lancedb


def _schema(width: int) -> Any:
    import pyarrow as pa

    return pa.schema([("id", pa.string()), ("vectors", pa.list_(pa.list_(pa.float16(), width)))])


def _rows(ids: Sequence[str], bags: Bags, schema: Any) -> Any:
    import pyarrow as pa

    values = pa.array(bags.values.half().cpu().numpy().reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(values, bags.dim)
    offsets = pa.array(bags.offsets.cpu().numpy().astype(np.int32))
    return pa.table({"id": pa.array(list(ids)), "vectors": pa.ListArray.from_arrays(offsets, vectors)}, schema=schema)


def _bags(found: Any) -> Bags:
    column = found["vectors"].combine_chunks()
    offsets = np.array(column.offsets, dtype=np.int64)
    width = column.type.value_type.list_size
    inside = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    values = np.array(inside.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(-1, width)
    return Bags(torch.from_numpy(values), torch.from_numpy(offsets - offsets[0]))


def _among(ids: Sequence[str]) -> str:
    """A condition; quotes in a name are doubled.

    >>> _among(["a", "o'b"])
    "id IN ('a', 'o''b')"
    """
    return f"id IN ({', '.join(chr(39) + name.replace(chr(39), chr(39) * 2) + chr(39) for name in ids)})"
