"""What lies in the folder of a store already, and whether it may be gone on with."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cenote.core.files as files
from cenote.core import InputError
from cenote.features.raw import RawItems
from cenote.features.store import Manifest, ShardFile, changes, finished_shards, is_store, read_listing, read_manifest
from cenote.features.store.manifest import MANIFEST
from cenote.features.store.shards import open_shard
from cenote.features.validate import Problems
from cenote.jobs.extract.plan import Options

TIMES = "times.json"


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


def begun(store: Path) -> Manifest | None:
    """The manifest of an earlier call."""
    return read_manifest(store) if (store / MANIFEST).exists() else None


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
