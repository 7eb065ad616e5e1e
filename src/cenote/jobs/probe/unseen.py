"""New data, raw or tokens, as a saved probe reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cenote.core import InputError, files
from cenote.core.memory import MAX_ITEM_SIZE
from cenote.features import TokenDataset, read
from cenote.features.raw import RawItems, open_raw
from cenote.features.rawness import is_raw
from cenote.features.reading import EMBEDDED, read_labelled
from cenote.jobs.extract import ModelSpec, Options, Progress, extract, planned
from cenote.jobs.extract.result import OnProgress
from cenote.jobs.extract.run import readable
from cenote.jobs.probe.saved import SavedProbe
from cenote.models import Backbone

GRAPHS = ".txt"
"""May hold graphs too: read as texts only where a model is known."""


@dataclass(frozen=True)
class Reading:
    """How new data become what a saved probe reads. All but the first four mean something of raw data only.

    Attributes:
        force: go on where the tokens are told to be other tokens than those that the probe was trained on.
        vector_column: of features, as of `cenote.features.read`.
        id_column: as of `cenote.features.read`, or of `cenote.features.raw.open_raw`.
        max_item_size: bytes that one item may take in memory.
        backbone: where the model lies now, or one for a probe that names none; default: where it lay in training.
        features: folder in which the tokens are kept; the same call again goes on. Default: none is kept.
        column: of a table, the one with the text, image or sound.
        names: of the columns of CSV files that have no header line.
        limit: only so many items, the first ones.
        batch: items in one call of the model.
        device: that the model computes on.
        skip_bad: leave unreadable items out.
        trust_remote_code: run Python code that lies with the model.
        allow_pickle: also take weights that are not safetensors.
    """

    force: bool = False
    vector_column: str | None = None
    id_column: str | None = None
    max_item_size: int = MAX_ITEM_SIZE
    backbone: str | None = None
    features: str | Path | None = None
    column: str | None = None
    names: Sequence[str] | None = None
    limit: int | None = None
    batch: int = 32
    device: str = "cpu"
    skip_bad: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False


OF_BOTH = ("force", "id_column", "max_item_size")


def views(
    saved: SavedProbe,
    data: str | Path | TokenDataset | RawItems,
    reading: Reading | None = None,
    *,
    on_progress: OnProgress = lambda _: None,
    on_message: Callable[[str], None] = lambda _: None,
) -> Iterator[TokenDataset]:
    """The items of new data in their order, as the probe reads them, so many at a time as memory and disk can hold.

    Args:
        saved: the probe.
        data: features as `cenote.features.read` takes them, a data set, or raw data: a folder of images or sounds, texts in a
            table, what `open_raw` opened. Raw data go through the model that the probe was trained with.
        reading: how.
        on_progress: called after every batch of the model.
        on_message: called with what a person should know.

    Raises:
        InputError: where the tokens are not of the probe's model, settings and layers, and this is not to be forced; and where
            something else cannot be used.
    """
    reading = reading or Reading()
    if isinstance(data, TokenDataset):
        yield saved.view(data, reading.force)
        return
    if not isinstance(data, RawItems):
        path = Path(data)
        raw = not (isinstance(data, str) and data in EMBEDDED) and reading.vector_column is None and is_raw(path)
        named = saved.origin is not None or reading.backbone is not None
        if not raw or (not named and path.suffix.lower() == GRAPHS):
            yield _of_tokens(saved, data, reading, on_message)
            return
        if not named:
            raise InputError(
                f"data: {data} is raw, and the probe does not say which model made the tokens that it was trained on; extract "
                f"its tokens first (cenote extract), or name the model with --backbone"
            )
        _require_defaults(reading, ("vector_column",), f"{data} is raw")
        data = open_raw(
            path,
            kind=None if saved.origin is None else saved.origin.kind,
            column=reading.column,
            names=reading.names,
            id_column=reading.id_column,
            limit=reading.limit,
            max_item_size=reading.max_item_size,
        )
        on_message(f"{len(data):,} items: {data.format}")
    yield from _of_raw(saved, data, reading, on_progress, on_message)


def _of_tokens(
    saved: SavedProbe, data: str | Path, reading: Reading, on_message: Callable[[str], None]
) -> TokenDataset:
    of_raw = [field.name for field in dataclasses.fields(Reading) if field.name not in (*OF_BOTH, "vector_column")]
    _require_defaults(reading, of_raw, f"{data} holds tokens already")
    found = read(
        data,
        vector_column=reading.vector_column,
        id_column=reading.id_column,
        prefix_tokens=saved.prefix_tokens,
        labelled=False,
        layers="all" if saved.layers else None,
        max_item_size=reading.max_item_size,
    )
    if saved.origin is not None and found.origin is None:
        on_message(f"the probe reads tokens of {saved.origin.name}; {data} does not say whose tokens it holds")
    return saved.view(found, reading.force)


def _require_defaults(reading: Reading, names: Sequence[str], why: str) -> None:
    """What means nothing of such data is not given."""
    for name in names:
        if getattr(reading, name) != getattr(Reading(), name):
            raise InputError(f"{name}: {why}; leave {name} out")


def _of_raw(
    saved: SavedProbe,
    items: RawItems,
    reading: Reading,
    on_progress: OnProgress,
    on_message: Callable[[str], None],
) -> Iterator[TokenDataset]:
    spec = model_of(saved, items.kind, reading)
    backbone = _loaded(saved, spec, reading)
    origin = saved.origin
    options = Options(
        layers=saved.layers or None,
        dtype=origin.dtype if origin is not None else "float16",  # type: ignore[arg-type]
        pool=None if origin is None else origin.pooled,
        batch=reading.batch,
        skip_bad=reading.skip_bad,
    )
    manifest = planned(items, backbone, options)
    saved.require(manifest.origin, manifest.dim, reading.force)
    job: dict[str, Any] = {"backbone": backbone, "on_message": on_message}
    if reading.features is not None:
        extract(items, spec, reading.features, options, on_progress=on_progress, **job)
        yield saved.view(read_labelled(reading.features, None, layers="all"), reading.force)
        return
    items, bad = readable(items, reading.skip_bad)
    for note in backbone.layout.notes:
        on_message(f"{backbone.identity.name}: {note}")
    for name, why in bad:
        on_message(f"left out {name}: {why}")
    options = replace(options, items_per_shard=manifest.items_per_shard)
    done, seconds = 0, 0.0
    for start in range(0, len(items), manifest.items_per_shard):
        piece = items.only(range(start, min(start + manifest.items_per_shard, len(items))))
        with files.temporary_folder() as folder:
            told = _Told(on_progress, done, seconds, len(items))
            extract(piece, spec, folder / "tokens", options, on_progress=told, **{**job, "on_message": lambda _: None})
            done, seconds = done + len(piece), told.seconds
            yield saved.view(read_labelled(folder / "tokens", None, layers="all"), reading.force)


class _Told:
    """Progress of a piece as that of the whole."""

    def __init__(self, on_progress: OnProgress, done: int, seconds: float, items: int) -> None:
        self.on_progress, self.done, self.before, self.items = on_progress, done, seconds, items
        self.seconds = seconds

    def __call__(self, now: Progress) -> None:
        self.seconds, done = self.before + now.seconds, self.done + now.done
        self.on_progress(Progress(done, self.items, done, self.seconds))


def model_of(saved: SavedProbe, kind: str, reading: Reading) -> ModelSpec:
    """The model that made the tokens which a probe was trained on, or the one that stands for it.

    Raises:
        InputError: where neither the probe nor the reading names one.
    """
    given: dict[str, Any] = {
        "device": reading.device,
        "trust_remote_code": reading.trust_remote_code,
        "allow_pickle": reading.allow_pickle,
    }
    origin = saved.origin
    if origin is None:
        if reading.backbone is None:
            raise InputError("backbone: the probe names no model; name the one that made the tokens it was trained on")
        return ModelSpec(reading.backbone, kind, **given)
    if kind != origin.kind:
        raise InputError(f"data: are {kind}, but {origin.name}, with which the probe was trained, takes {origin.kind}")
    name = reading.backbone or origin.name
    return ModelSpec(
        name,
        kind,
        revision=None if reading.backbone is not None or Path(name).expanduser().is_dir() else origin.model["revision"],
        precision=origin.model.get("precision", "float32"),
        max_length=origin.preprocessing.get("max_length") if kind == "text" else None,
        **given,
    )


def _loaded(saved: SavedProbe, spec: ModelSpec, reading: Reading) -> Backbone:
    try:
        return spec.load()
    except InputError as error:
        if reading.backbone is not None or saved.origin is None or not str(error).startswith("backbone"):
            raise
        raise InputError(f"{error}; the probe was trained with it: where it lies now, say with --backbone") from error
