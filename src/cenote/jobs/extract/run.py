"""The shards that are missing are computed, and the store is finished."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cenote.core.files as files
from cenote.core import InputError
from cenote.core.json_text import json_text
from cenote.features.raw import Item, Kind, RawItems, UnreadableError
from cenote.features.store import Manifest, ShardEntry, ShardFile, finished_shards
from cenote.features.store.shards import open_shard
from cenote.features.validate import Problems
from cenote.jobs.extract.engine import Engine
from cenote.jobs.extract.result import OnProgress, Progress
from cenote.jobs.extract.resume import READERS, TIMES
from cenote.jobs.extract.spec import Job, shards

READ_AT_ONCE = 256
HINT = "repair it, take it out, or leave such items out with --skip-bad"


def require_readable(items: RawItems, manifest: Manifest, kept: set[int], old_bad: list[tuple[str, str]]) -> None:
    """Every item that is still to do can be read; all that cannot are named at once."""
    problems = Problems("data")
    for name, reason in old_bad:
        problems.add("unreadable", f"item {name!r} was left out by an earlier run: it {reason}; {HINT}")
    for shard in shards(items, manifest, kept):
        for item, why in _checked(shard.items, items.kind):
            if why is not None:
                problems.add("unreadable", f"item {item.id!r} {why}; {HINT}")
    problems.raise_any()


def readable(items: RawItems, skip_bad: bool) -> tuple[RawItems, list[tuple[str, str]]]:
    """The items that can be read, and those that cannot, each with the reason.

    Raises:
        InputError: naming all that cannot, unless they are to be left out; or where none can.
    """
    problems, bad, good = Problems("data"), [], []
    for number, (item, why) in enumerate(_checked(items.items, items.kind)):
        if why is None:
            good.append(number)
        else:
            bad.append((item.id, why))
            problems.add("unreadable", f"item {item.id!r} {why}; {HINT}")
    if not skip_bad or not good:
        problems.raise_any()
    return (items if not bad else items.only(good)), bad


def _checked(items: Sequence[Item], kind: Kind) -> Iterator[tuple[Item, str | None]]:
    """Every item, and why it cannot be read, if it cannot."""
    if kind == "text":
        # it lies in memory: asking other threads would take longer than to look
        yield from ((item, _unreadable(item)) for item in items)
        return
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(items), READ_AT_ONCE):
            part = items[start : start + READ_AT_ONCE]
            yield from zip(part, readers.map(_unreadable, part), strict=True)


def _unreadable(item: Item) -> str | None:
    try:
        item.check()
    except UnreadableError as error:
        return str(error)
    return None


def run(
    items: RawItems, job: Job, kept: set[int], engine: Engine, on_progress: OnProgress
) -> tuple[list[ShardEntry], int]:
    """Have an engine compute all shards but those that are kept: what was written, and how many items that took."""
    manifest = job.manifest
    done = sum(len(shard.items) for shard in shards(items, manifest, set(range(manifest.shard_count)) - kept))
    computed, began = 0, time.perf_counter()
    written: list[ShardEntry] = []

    def on_items(count: int) -> None:
        nonlocal computed
        computed += count
        on_progress(Progress(done + computed, len(items), computed, time.perf_counter() - began))

    engine.run(job, shards(items, manifest, kept), written.append, on_items)
    return written, computed


def completed(store: Path, manifest: Manifest, written: list[ShardEntry]) -> Manifest:
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


def write_times(store: Path, computed: int, seconds: float) -> None:
    """Add what this call took to what others took."""
    path = store / TIMES
    try:
        runs = list(files.opened(files.read_json(path), path)["runs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        runs = []
    runs.append({"finished": time.time(), "items": computed, "seconds": seconds})
    files.write_whole(path, json_text(files.sealed({"runs": runs}), indent=1) + "\n")
