"""What lies in the folder of a store already, and whether it may be gone on with."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cenote.core.files as files
from cenote.core import InputError
from cenote.features.raw import Item, RawItems
from cenote.features.store import Manifest, ShardFile, changes, finished_shards, is_store, read_listing, read_manifest
from cenote.features.store.manifest import MANIFEST, DamagedManifest
from cenote.features.store.shards import open_shard
from cenote.features.validate import Problems
from cenote.jobs.extract.plan import Options

TIMES = "times.json"
READERS = 4


def require_usable(store: Path) -> None:
    """The folder can be a store, as far as can be told without writing to it."""
    there = lowest(store)
    if not there.is_dir():
        raise InputError(f"out: cannot make {store}: {there} is a file; name another folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"out: cannot make {store}: {there} may not be written to; name another folder")
    if there == store and not is_store(store) and _foreign(store):
        raise InputError(f"out: {store} is no feature store and not empty; name another folder")


def lowest(path: Path) -> Path:
    """The path, or the lowest of the folders above it that is there."""
    return next(f for f in (path, *path.absolute().parents) if f.exists())


def _foreign(store: Path) -> bool:
    """Whether a folder without a manifest holds anything that is not a store's."""
    own = (files.LOCK, TIMES, "shards", "items.parquet")
    return any(path.name not in own and not path.name.startswith(".") for path in store.iterdir())


def begun(store: Path, on_message: Callable[[str], None] = lambda _: None) -> Manifest | None:
    """The manifest of an earlier call; `None` where there is none, or it is damaged: it is written again."""
    try:
        return read_manifest(store) if (store / MANIFEST).exists() else None
    except DamagedManifest:
        on_message(f"{MANIFEST} is damaged: written again")
        return None


def continued(options: Options, before: Manifest | None) -> Options:
    """The options of a call that goes on: the size of a shard was chosen when the store was begun."""
    if before is None or options.items_per_shard is not None:
        return options
    return replace(options, items_per_shard=before.items_per_shard)


def require_same(store: Path, before: Manifest | None, now: Manifest, items: RawItems) -> None:
    """What was begun is what is asked for now.

    Raises:
        InputError: that names every difference.
    """
    if before is None or before.key() == now.key():
        return
    found = before.differences(now)
    if before.items_sha256 != now.items_sha256:
        words = changes(read_listing(store), items)
        found = [d for d in found if not d.startswith(("the items:", "number of items:"))]
        found.append(f"the items: {words or 'not those of before'}")
    listed = "\n".join(f"  - {difference}" for difference in found)
    raise InputError(
        f"out: {store} was made otherwise:\n{listed}\nname another folder for the new features, or delete this one"
    )


def whole_shards(
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


def require_unchanged(items: RawItems, manifest: Manifest, kept: dict[int, ShardFile]) -> None:
    """The bytes of every item of a finished shard are still those that it was made from."""
    problems = Problems("data")
    size = manifest.items_per_shard
    with ThreadPoolExecutor(READERS) as readers:
        # a text lies in memory: asking other threads would take longer than to look
        ask = map if items.kind == "text" else readers.map
        for number, shard in kept.items():
            batch, _ = open_shard(shard.path)
            digests = dict(zip(batch.column("id").to_pylist(), batch.column("input").to_pylist(), strict=True))
            made = [item for item in items.items[number * size : (number + 1) * size] if item.id in digests]
            for item, changed in zip(made, ask(_changed, made, [digests[item.id] for item in made]), strict=True):
                if changed:
                    problems.add(
                        "changed",
                        f"item {item.id!r} has changed since it was extracted; name another folder, or delete "
                        f"{shard.path.name} to extract its {size} items again",
                    )
    problems.raise_any()


def _changed(item: Item, digest: bytes) -> bool:
    return item.changed(digest)


def left_out(shard: ShardFile) -> list[tuple[str, str]]:
    """The unreadable items of a shard, and why each is."""
    _, about = open_shard(shard.path)
    return [(str(name), str(why)) for name, why in json.loads(about[b"cenote.skipped"])]


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """The folder is there, nobody else writes to it, and a full disk is told in words."""
    _make(store)
    with _told_of_full_disks(store), files.alone(store, "cenote extract"):
        yield


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
