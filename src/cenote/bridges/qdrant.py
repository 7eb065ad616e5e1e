"""Qdrant as a store of many vectors per document: MaxSim of dot products, which keeps the norms of raw means.

```python
from cenote.bridges.qdrant import QdrantStore

store = QdrantStore("index", Meta("model", 384, "hierarchical-raw", 4.0, unit_norm=False))
```
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import cenote.core.files as files
from cenote.core import Bags, InputError
from cenote.core.requirements import require_at_least
from cenote.features.vectors import Hits, Meta, disk_bytes, opened_meta, require_vectors, require_width

COLLECTION, FOLDER = "vectors", "qdrant"
AT_ONCE = 256


class QdrantStore:
    """Vectors in a collection of Qdrant, of a folder (local mode, which looks at all of them) or of a client of yours.

    Args:
        folder: of the index, and of what Qdrant writes in local mode.
        meta: what it is to hold; default: what it holds.
        client: a `QdrantClient` of a server; default: local mode.

    Raises:
        InputError: where it holds something else, is not there, or qdrant-client is not installed.
    """

    def __init__(self, folder: str | Path, meta: Meta | None = None, client: Any = None) -> None:
        library, models = _library()
        self.folder = Path(folder)
        self._meta = opened_meta(self.folder, meta)
        self._models = models
        self._local = client is None
        self._client = library.QdrantClient(path=str(self.folder / FOLDER)) if client is None else client
        if not self._client.collection_exists(COLLECTION):
            self._client.create_collection(
                COLLECTION,
                vectors_config=models.VectorParams(
                    size=self._meta.width,
                    distance=models.Distance.DOT,
                    multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
                    # a graph of multi-vectors is never used to score exactly, and takes more room than they do
                    hnsw_config=models.HnswConfigDiff(m=0),
                ),
            )

    @property
    def meta(self) -> Meta:
        """What it holds."""
        return self._meta

    @property
    def nbytes(self) -> int:
        """That it takes on disk, in local mode."""
        return disk_bytes(self.folder)

    def __len__(self) -> int:
        return int(self._client.count(COLLECTION, exact=True).count)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those that are not in it, in their order."""
        there: set[str] = set()
        for start in range(0, len(ids), AT_ONCE):
            wanted = [_point(name) for name in ids[start : start + AT_ONCE]]
            found = self._client.retrieve(COLLECTION, wanted, with_payload=["id"], with_vectors=False)
            there |= {point.payload["id"] for point in found}
        return [name for name in ids if name not in there]

    def add(self, ids: Sequence[str], bags: Bags) -> int:
        """Add documents, but those whose id is there already.

        Raises:
            InputError: where vectors are NaN or of another width.
        """
        require_vectors(ids, bags, self.meta)
        with files.alone(self.folder, "index"):
            new = set(self.missing(ids))
            rows = [row for row, name in enumerate(ids) if name in new]
            for start in range(0, len(rows), AT_ONCE):
                points = [
                    self._models.PointStruct(
                        id=_point(ids[row]), vector=bags[row].float().cpu().tolist(), payload={"id": ids[row]}
                    )
                    for row in rows[start : start + AT_ONCE]
                ]
                self._client.upsert(COLLECTION, points, wait=True)
        return len(rows)

    def search(self, bags: Bags, k: int = 10) -> Hits:
        """The `k` best documents of each query."""
        require_at_least(1, k=k)
        require_width(bags, self.meta)
        count = min(k, len(self))
        names, scores = [], []
        for query in bags:
            asked = query.float().cpu().tolist()
            found = (
                self._client.query_points(COLLECTION, query=asked, limit=count, with_payload=["id"]).points
                if count
                else []
            )
            names.append([point.payload["id"] for point in found])
            scores.append([point.score for point in found])
        return Hits(names, torch.tensor(scores, dtype=torch.float32).view(len(bags), count), exact=self._local)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents; how many were there."""
        with files.alone(self.folder, "index"):
            count = len(ids) - len(self.missing(ids))
            self._client.delete(COLLECTION, self._models.PointIdsList(points=[_point(name) for name in ids]), wait=True)
        return count

    def batches(self) -> Iterator[tuple[list[str], Bags]]:
        """Ids and vectors of some documents after the other."""
        onward = None
        while True:
            points, onward = self._client.scroll(COLLECTION, limit=AT_ONCE, offset=onward, with_vectors=True)
            if points:
                yield [p.payload["id"] for p in points], Bags.from_list([torch.tensor(p.vector) for p in points])
            if onward is None:
                return

    def close(self) -> None:
        """Let go of the folder, which local mode holds for itself."""
        self._client.close()


def _library() -> tuple[Any, Any]:
    try:
        import qdrant_client
        from qdrant_client import models
    except ImportError as error:
        raise InputError(
            "store: qdrant-client is not installed; pip install 'cenote[index]', or take exact://"
        ) from error
    return qdrant_client, models


def _point(name: str) -> str:
    """The id of a document as Qdrant wants one: the same for the same name.

    >>> _point("d1") == _point("d1"), len(_point("d1"))
    (True, 36)
    """
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"cenote:{name}"))
