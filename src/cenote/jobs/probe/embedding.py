"""A saved probe's pooled vectors of new data, and the files that they are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError, files
from cenote.core.json_text import json_text
from cenote.features import TokenDataset
from cenote.features.raw import RawItems
from cenote.jobs.extract.result import OnProgress
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.saved import SavedProbe, load
from cenote.jobs.probe.training import vectors
from cenote.jobs.probe.unseen import Reading, views

ID, VECTOR = "id", "vector"
PARQUET, NPY = ".parquet", ".npy"
ABOUT = b"cenote"
"""Of a Parquet file's metadata, what says where the vectors are from."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """One vector per item.

    Attributes:
        ids: of the items.
        vectors: what the classifier of the probe reads, before it normalises: several vectors of a pool side by side.
        about: method, model and layers that they are from.
    """

    ids: tuple[str, ...]
    vectors: Float[Tensor, "items width"]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def write(self, out: str | Path) -> None:
        """Write a Parquet file with the columns `id` and `vector`, or an `.npy` file and the ids in `NAME.ids.json` beside it.

        Raises:
            InputError: where the name ends otherwise.
        """
        out = Path(out)
        require_name(out)
        if out.suffix == NPY:
            with files.whole(out) as file:
                np.save(file, self.vectors.numpy())
            files.write_whole(ids_beside(out), json_text({"ids": self.ids, **self.about}, indent=1) + "\n")
            return
        import pyarrow.parquet as pq

        with files.whole(out) as file:
            pq.write_table(self.table().replace_schema_metadata({ABOUT: json.dumps(dict(self.about))}), file)

    def table(self) -> Any:
        """As an Arrow table with the columns `id` and `vector`, lists of `width` float32 numbers."""
        import pyarrow as pa

        flat = pa.array(self.vectors.numpy().reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1])
        return pa.table({ID: pa.array(self.ids, pa.string()), VECTOR: lists})


def require_name(out: Path) -> None:
    """Raise `InputError` unless the name of a file says what is written to it.

    >>> require_name(Path("vectors.csv"))
    Traceback (most recent call last):
    cenote.core.errors.InputError: out: expected a name that ends in .parquet or .npy, got vectors.csv
    """
    if out.suffix not in (PARQUET, NPY):
        raise InputError(f"out: expected a name that ends in {PARQUET} or {NPY}, got {out}")


def ids_beside(out: Path) -> Path:
    """Where the ids of an `.npy` file stand."""
    return out.with_name(f"{out.stem}.ids.json")


def embed(
    probe: SavedProbe | str | Path,
    data: str | Path | TokenDataset | RawItems,
    reading: Reading | None = None,
    *,
    on_progress: OnProgress = lambda _: None,
    on_message: Callable[[str], None] = lambda _: None,
) -> Embedded:
    """The pooled vectors that a saved probe makes of new items; all of them are held in memory.

    Args:
        probe: or the folder that it lies in, `OUT/best` or `OUT/recommended`.
        data: as for `cenote.predict`.
        reading: how, see `Reading`.
        on_progress: called after every batch of the model.
        on_message: called with what a person should know.

    Raises:
        InputError: as `cenote.predict` would.

    Example:
        `cenote.embed("out/best", "new.tsv").write("vectors.parquet")`
    """
    saved = probe if isinstance(probe, SavedProbe) else load(probe)
    ids: list[str] = []
    parts: list[Tensor] = []
    for view in views(saved, data, reading, on_progress=on_progress, on_message=on_message):
        with torch.no_grad():
            parts.append(vectors(saved.probe, view, torch.arange(len(view)), Recipe.tokens_at_once).float())
        ids += view.ids
    about = {
        "method": saved.method,
        "model": None if saved.origin is None else dict(saved.origin.model),
        "layers": list(saved.layers),
    }
    return Embedded(tuple(ids), torch.cat(parts), about)
