"""What an extraction is to do: its options, the manifest of its store, the size of its shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from cenote.core import InputError
from cenote.core.libraries import versions
from cenote.core.requirements import require_one_of
from cenote.features.raw import RawItems, UnreadableError
from cenote.features.store import Dtype, Manifest
from cenote.features.store.shards import DTYPES
from cenote.jobs.extract.work import token_pool
from cenote.models import Backbone, Layout, chosen_layers

BATCH = 32
SHARD_BYTES = 2**26
FEWEST_ITEMS, MOST_ITEMS = 32, 65_536
SAMPLED_FOR_SIZE = 8


@dataclass(frozen=True)
class Options:
    """How to extract.

    Attributes:
        layers: see `cenote.models.chosen_layers`.
        dtype: of the stored numbers.
        pool: name of a pool without weights; only its output is stored, one vector per item.
        batch: items in one call of the model.
        items_per_shard: default: as many as fill about 64 MB.
        skip_bad: leave unreadable items out.

    Raises:
        InputError: for another dtype.
    """

    layers: str | int | Sequence[int] | None = None
    dtype: Dtype = "float16"
    pool: str | None = None
    batch: int = BATCH
    items_per_shard: int | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        require_one_of(get_args(Dtype), dtype=self.dtype)


def planned(items: RawItems, backbone: Backbone, options: Options) -> Manifest:
    """The manifest of an extraction before it starts.

    Raises:
        InputError: where options do not fit the model or the items.
    """
    layout = backbone.layout
    if options.batch < 1 or (options.items_per_shard is not None and options.items_per_shard < 1):
        raise InputError("batch, items_per_shard: expected 1 or more")
    if not len(items):
        raise InputError("data: holds no item")
    if layout.kind != items.kind:
        raise InputError(f"backbone: {backbone.identity.name} takes {layout.kind}, but the data are {items.kind}")
    layers = chosen_layers(options.layers, layout)
    dim = layout.dims[layers[0]]
    token_pool(options.pool, dim, layout.prefix_tokens)
    pooled = options.pool is not None
    return Manifest(
        kind=items.kind,
        model={**_identified(backbone), "precision": str(backbone.precision).removeprefix("torch.")},
        preprocessing=dict(layout.preprocessing),
        layers=layers,
        dim=dim,
        dtype=options.dtype,
        prefix_tokens=0 if pooled else layout.prefix_tokens,
        grid=None if pooled or layout.tokens[layers[0]] != layout.tokens[-1] else layout.grid,
        pooled=options.pool,
        items=len(items),
        items_sha256=items.sha256(),
        items_per_shard=options.items_per_shard or _fitting(items, backbone, layout, layers, options),
        batch=options.batch,
        versions=versions(*backbone.libraries),
    )


def _identified(backbone: Backbone) -> dict[str, Any]:
    """Which model, without a word of code of its own where it has none: stores of before there was one stay good."""
    found = asdict(backbone.identity)
    return found if found["code_sha256"] is not None else {k: v for k, v in found.items() if k != "code_sha256"}


def _fitting(items: RawItems, backbone: Backbone, layout: Layout, layers: tuple[int, ...], options: Options) -> int:
    """Items that fill about one shard: a power of two, from the tokens of a few items spread over all."""
    if options.pool is not None:
        tokens = 1.0
    elif layout.kind == "image":
        tokens = float(layout.tokens[layers[0]])
    else:
        lengths = []
        for item in spread(items.items, SAMPLED_FOR_SIZE):
            try:
                content = item.read().content
            except UnreadableError:
                continue
            lengths += backbone.lengths([content], layers[0])
        tokens = sum(lengths) / max(len(lengths), 1) or 1.0
    per_item = tokens * layout.dims[layers[0]] * itemsize(options.dtype) * len(layers)
    return min(max(2 ** int(math.log2(max(SHARD_BYTES / per_item, 1))), FEWEST_ITEMS), MOST_ITEMS)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many items, spread over all."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def itemsize(dtype: Dtype) -> int:
    """Bytes of a stored number."""
    return torch.empty(0, dtype=DTYPES[dtype]).element_size()
