"""Raw items and a model -> a feature store; interrupted at any moment, the same call goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

import cenote.core.files as files
from cenote.core import InputError
from cenote.core.libraries import versions
from cenote.core.requirements import require_one_of
from cenote.features.raw import Item, RawItems, UnreadableError
from cenote.features.store import (
    Dtype,
    Manifest,
    ShardEntry,
    ShardFile,
    changes,
    finished_shards,
    is_store,
    read_listing,
    read_manifest,
    write_listing,
)
from cenote.features.store.manifest import MANIFEST
from cenote.features.store.shards import DTYPES, open_shard, remove_unfinished
from cenote.features.validate import Problems
from cenote.jobs.extract.engine import Engine, LocalEngine
from cenote.jobs.extract.spec import Job, ModelSpec, Shard, shards
from cenote.jobs.extract.work import Worker, token_pool
from cenote.models import Backbone, Layout, chosen_layers

BATCH = 32
SHARD_BYTES = 2**26
FEWEST_ITEMS, MOST_ITEMS = 32, 65_536
SAMPLED_FOR_SIZE, SAMPLED_FOR_TIME = 8, 64
READERS, READ_AT_ONCE = 4, 256
LOCK, TIMES = ".lock", "times.json"


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
    """

    layers: str | int | Sequence[int] | None = None
    dtype: Dtype = "float16"
    pool: str | None = None
    batch: int = BATCH
    items_per_shard: int | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class Estimate:
    """What an extraction will take, from a timed sample.

    `tokens` and `bytes` are those of the whole store, `seconds` the time of this machine, `sampled` how many items were timed.
    """

    items: int
    tokens: int
    bytes: int
    seconds: float
    sampled: int
    shards: int
    free_bytes: int


@dataclass(frozen=True)
class Extracted:
    """What an extraction did.

    Attributes:
        store: the folder.
        manifest: complete.
        computed, kept: numbers of shards.
        remade: names of damaged shards that were made anew.
        skipped: unreadable items that were left out, and why.
        seconds: wall time.
    """

    store: Path
    manifest: Manifest
    computed: int
    kept: int
    remade: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far it is: items done (kept ones included), all items, items computed by this call and the seconds that took."""

    done: int
    items: int
    computed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Items per second, of this call."""
        return self.computed / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float:
        """Seconds that the rest will take at this rate."""
        return (self.items - self.done) / self.rate if self.rate else math.inf


OnProgress = Callable[[Progress], None]


def planned(items: RawItems, backbone: Backbone, options: Options) -> Manifest:
    """The manifest of an extraction before it starts.

    Raises:
        InputError: where options do not fit the model or the items.
    """
    layout = backbone.layout
    require_one_of(get_args(Dtype), dtype=options.dtype)
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
        model={**asdict(backbone.identity), "precision": str(backbone.precision).removeprefix("torch.")},
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
        versions=versions(),
    )


def estimate(
    items: RawItems, spec: ModelSpec, out: Path, options: Options, backbone: Backbone | None = None
) -> Estimate:
    """Items, tokens, bytes and time, from a timed sample of items spread over all; nothing is written.

    Raises:
        InputError: where `extract` with the same arguments would, so far as can be told before it runs.
    """
    _require_usable(out)
    backbone = backbone or spec.load()
    before = read_manifest(out) if (out / MANIFEST).exists() else None
    if before is not None and options.items_per_shard is None:
        options = replace(options, items_per_shard=before.items_per_shard)
    manifest = planned(items, backbone, options)
    if before is not None and before.key() != manifest.key():
        raise InputError(_changed(out, before, manifest, items))
    worker = Worker(Job(out, spec, manifest, skip_bad=True), backbone)
    sample = _spread(items.items, SAMPLED_FOR_TIME)
    worker.rows(sample[: min(len(sample), manifest.batch)])
    start = time.perf_counter()
    rows = worker.rows(sample)
    seconds = time.perf_counter() - start
    if not rows.ids:
        name, why = rows.skipped[0]
        raise InputError(f"data: none of {len(sample)} sampled items can be read; the first, {name!r}, {why}")
    share = len(items) / len(rows.ids)
    tokens = round(sum(rows.lengths) * share)
    free = os.statvfs(_lowest(out))
    return Estimate(
        items=len(items),
        tokens=tokens,
        bytes=tokens * len(manifest.layers) * manifest.dim * _itemsize(manifest.dtype),
        seconds=seconds * len(items) / len(sample),
        sampled=len(sample),
        shards=manifest.shard_count,
        free_bytes=free.f_bavail * free.f_frsize,
    )


def extract(
    items: RawItems,
    spec: ModelSpec,
    out: str | Path,
    options: Options | None = None,
    *,
    engine: Engine | None = None,
    backbone: Backbone | None = None,
    on_progress: OnProgress = lambda _: None,
    on_message: Callable[[str], None] = lambda _: None,
    on_model: Callable[[Layout], None] = lambda _: None,
) -> Extracted:
    """Extract token features into a store, or go on where an earlier call stopped.

    Before the model runs, every item that is still to do is read once, and all that cannot be are named in one error
    (unless `skip_bad`: then they are left out and listed). What lies in the store is checked first: shards whose bytes do
    not match their checksum are made anew.

    Args:
        items: see `cenote.features.raw.open_raw`.
        spec: which model.
        out: folder of the store; the same call again goes on.
        options: what to keep.
        engine: who computes; default: this process.
        backbone: the model, if it is loaded already.
        on_progress: called after every batch.
        on_message: called with what a person should know.
        on_model: called with what the model gives, before anything is written; what it raises ends the extraction.

    Raises:
        InputError: where the store was made from another model, other items or with other options (each difference is named),
            somebody else is writing to it, items cannot be read, or the disk is full.
    """
    start = time.perf_counter()
    options = options or Options()
    store = Path(out)
    _require_usable(store)
    # with an engine elsewhere, this machine needs the model for its layout alone, and may have no GPU
    is_here = engine is None or isinstance(engine, LocalEngine)
    backbone = backbone or (spec if is_here else replace(spec, device="cpu")).load()
    on_model(backbone.layout)
    for note in backbone.layout.notes:
        on_message(f"{backbone.identity.name}: {note}")
    before = read_manifest(store) if (store / MANIFEST).exists() else None
    if before is not None and options.items_per_shard is None:
        # the size of a shard was chosen when the store was begun
        options = replace(options, items_per_shard=before.items_per_shard)
    manifest = planned(items, backbone, options)
    _make(store)
    with _told_of_full_disks(store), _alone(store):
        if before is not None and before.key() != manifest.key():
            raise InputError(_changed(store, before, manifest, items))
        remove_unfinished(store)
        if before is None:
            manifest.write(store)
        write_listing(store, items)
        kept, remade = _checked(store, manifest, before, on_message)
        _unchanged(items, manifest, kept)
        old_bad = [bad for shard in kept.values() for bad in _skipped(shard)]
        if not options.skip_bad:
            _all_readable(items, manifest, set(kept), old_bad)
        job = Job(store.absolute(), spec, manifest, options.skip_bad)
        done = sum(len(shard.items) for shard in shards(items, manifest, set(range(manifest.shard_count)) - set(kept)))
        computed, began = 0, time.perf_counter()
        written: list[ShardEntry] = []

        def on_items(count: int) -> None:
            nonlocal computed
            computed += count
            on_progress(Progress(done + computed, len(items), computed, time.perf_counter() - began))

        chosen = engine or LocalEngine(backbone)
        chosen.run(job, shards(items, manifest, set(kept)), written.append, on_items)
        complete = _complete(store, manifest, written)
        complete.write(store)
        seconds = time.perf_counter() - start
        _write_times(store, computed, seconds)
    bad = [bad for shard in finished_shards(store).values() for bad in _skipped(shard)]
    if len(bad) == len(items):
        raise InputError(f"data: none of {len(items):,} items can be read; the first, {bad[0][0]!r}, {bad[0][1]}")
    return Extracted(store, complete, len(written), len(kept), remade, tuple(bad), seconds)


def _fitting(items: RawItems, backbone: Backbone, layout: Layout, layers: tuple[int, ...], options: Options) -> int:
    """Items that fill about one shard: a power of two, from the tokens of a few items spread over all."""
    if options.pool is not None:
        tokens = 1.0
    elif layout.kind == "image":
        tokens = float(layout.tokens[layers[0]])
    else:
        lengths = []
        for item in _spread(items.items, SAMPLED_FOR_SIZE):
            try:
                content = item.read().content
            except UnreadableError:
                continue
            lengths += backbone.lengths([content], layers[0])
        tokens = sum(lengths) / max(len(lengths), 1) or 1.0
    per_item = tokens * layout.dims[layers[0]] * _itemsize(options.dtype) * len(layers)
    return min(max(2 ** int(math.log2(max(SHARD_BYTES / per_item, 1))), FEWEST_ITEMS), MOST_ITEMS)


def _changed(store: Path, before: Manifest, now: Manifest, items: RawItems) -> str:
    found = before.differences(now)
    if before.items_sha256 != now.items_sha256:
        words = changes(read_listing(store), items)
        found = [d for d in found if not d.startswith(("the items:", "number of items:"))]
        found.append(f"the items: {words or 'not those of before'}")
    listed = "\n".join(f"  - {difference}" for difference in found)
    return f"out: {store} was made otherwise:\n{listed}\nname another folder for the new features, or delete this one"


def _checked(
    store: Path, manifest: Manifest, before: Manifest | None, on_message: Callable[[str], None]
) -> tuple[dict[int, ShardFile], tuple[str, ...]]:
    """The finished shards that are whole and belong here; damaged ones are deleted."""
    key, kept, remade = manifest.key(), {}, []
    for number, shard in finished_shards(store).items():
        if number >= manifest.shard_count:
            raise InputError(f"{shard.path}: the store has {manifest.shard_count} shards only; take the file out")
        if not shard.whole():
            on_message(f"{shard.path.name} is damaged: made anew")
            shard.path.unlink()
            remade.append(shard.path.name)
            continue
        _, about = open_shard(shard.path)
        if about.get(b"cenote.key", b"").decode() != key:
            raise InputError(f"{shard.path}: is a shard of another store; take it out and run the same command again")
        kept[number] = shard
    if before is not None and before.shards is not None:
        lost = {s.file for s in before.shards} - {shard.path.name for shard in kept.values()} - set(remade)
        for name in sorted(lost):
            on_message(f"{name} is lost: made anew")
    return kept, tuple(remade)


def _unchanged(items: RawItems, manifest: Manifest, kept: dict[int, ShardFile]) -> None:
    """No file of a finished shard was written to since, unless its bytes are still the same."""
    problems = Problems("data")
    size = manifest.items_per_shard
    for number, shard in kept.items():
        batch, _ = open_shard(shard.path)
        made = shard.path.stat().st_mtime
        digests = dict(zip(batch.column("id").to_pylist(), batch.column("input").to_pylist(), strict=True))
        for item in items.items[number * size : (number + 1) * size]:
            if item.id in digests and item.changed_since(made, digests[item.id]):
                problems.add(
                    "changed",
                    f"item {item.id!r} has changed since it was extracted; name another folder, or delete "
                    f"{shard.path.name} to extract its {size} items again",
                )
    problems.raise_any()


def _all_readable(items: RawItems, manifest: Manifest, kept: set[int], old_bad: list[tuple[str, str]]) -> None:
    """Every item that is still to do can be read; all that cannot are named at once."""
    problems = Problems("data")
    hint = "repair it, take it out, or leave such items out with --skip-bad"
    for name, reason in old_bad:
        problems.add("unreadable", f"item {name!r} was left out by an earlier run: it {reason}; {hint}")
    with ThreadPoolExecutor(READERS) as readers:
        # a text lies in memory: asking other threads would take longer than to look
        ask = map if items.kind == "text" else readers.map
        for shard in shards(items, manifest, kept):
            for start in range(0, len(shard.items), READ_AT_ONCE):
                part = shard.items[start : start + READ_AT_ONCE]
                for item, why in zip(part, ask(_unreadable, part), strict=True):
                    if why is not None:
                        problems.add("unreadable", f"item {item.id!r} {why}; {hint}")
    problems.raise_any()


def _unreadable(item: Item) -> str | None:
    try:
        item.check()
    except UnreadableError as error:
        return str(error)
    return None


def _complete(store: Path, manifest: Manifest, written: list[ShardEntry]) -> Manifest:
    """The manifest with all shards, from what lies in the folder."""
    entries: dict[str, ShardEntry] = {entry.file: entry for entry in written}
    found = finished_shards(store)
    missing = sorted(set(range(manifest.shard_count)) - set(found))
    if missing:
        raise InputError(
            f"{store}: shards {missing[:5]} are missing after all work is done; run the same command again"
        )
    return manifest.finished(tuple(entries.get(found[n].path.name) or _entry(found[n]) for n in sorted(found)))


def _entry(shard: ShardFile) -> ShardEntry:
    import hashlib

    with shard.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    batch, about = open_shard(shard.path)
    column = next(name for name in batch.schema.names if name.startswith("layer_"))
    offsets = batch.column(column).offsets
    skipped = json.loads(about[b"cenote.skipped"])
    return ShardEntry(
        shard.path.name,
        digest,
        len(batch),
        int(offsets[len(batch)].as_py()),
        shard.path.stat().st_size,
        len(skipped),
        int(about[b"cenote.shortened"]),
    )


def _skipped(shard: ShardFile) -> list[tuple[str, str]]:
    _, about = open_shard(shard.path)
    return [(str(name), str(why)) for name, why in json.loads(about[b"cenote.skipped"])]


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Holds the store's lock; it goes with the process, however that ends."""
    handle = os.open(store / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 200).decode(errors="replace").strip()
            raise InputError(
                f"out: another cenote extract is writing to {store} ({owner or 'unknown process'}); wait for it, or stop it"
            ) from error
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield
    finally:
        os.close(handle)


def _require_usable(store: Path) -> None:
    """The folder can be a store, as far as can be told without writing to it."""
    there = _lowest(store)
    if not there.is_dir():
        raise InputError(f"out: cannot make {store}: {there} is a file; name another folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"out: cannot make {store}: {there} may not be written to; name another folder")
    if there == store and not is_store(store) and _foreign(store):
        raise InputError(f"out: {store} is no feature store and not empty; name another folder")


def _lowest(path: Path) -> Path:
    """The path, or the lowest of the folders above it that is there."""
    return next(f for f in (path, *path.absolute().parents) if f.exists())


def _make(store: Path) -> None:
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot make {store}: {error.strerror}; name another folder") from error


@contextmanager
def _told_of_full_disks(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise InputError(
            f"out: cannot write to {store} ({error.strerror}); finished shards are kept: make room and run the same command "
            f"again"
        ) from error


def _foreign(store: Path) -> bool:
    """Whether a folder without a manifest holds anything that is not a store's."""
    own = (LOCK, TIMES, "shards", "items.parquet")
    return any(path.name not in own and not path.name.startswith(".") for path in store.iterdir())


def _write_times(store: Path, computed: int, seconds: float) -> None:
    path = store / TIMES
    try:
        runs = json.loads(path.read_text("utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        runs = []
    runs.append({"finished": time.time(), "items": computed, "seconds": seconds})
    files.write_whole(path, json.dumps({"runs": runs}, indent=1) + "\n")


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """So many items, spread over all."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _itemsize(dtype: Dtype) -> int:
    return torch.empty(0, dtype=DTYPES[dtype]).element_size()


__all__ = ["Estimate", "Extracted", "Options", "Progress", "Shard", "estimate", "extract", "planned"]
