"""Raw items and a model -> a feature store; interrupted at any moment, the same call goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cenote.core import InputError
from cenote.features.raw import RawItems
from cenote.features.store import finished_shards, write_listing
from cenote.features.store.shards import remove_unfinished
from cenote.jobs.extract.engine import Engine, LocalEngine
from cenote.jobs.extract.plan import Options, planned
from cenote.jobs.extract.result import Extracted, OnProgress
from cenote.jobs.extract.resume import (
    begun,
    continued,
    left_out,
    require_same,
    require_unchanged,
    require_usable,
    whole_shards,
    writing,
)
from cenote.jobs.extract.run import completed, require_readable, run, write_times
from cenote.jobs.extract.spec import Job, ModelSpec
from cenote.models import Backbone, Layout


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
    require_usable(store)
    # with an engine elsewhere, this machine needs the model for its layout alone, and may have no GPU
    is_here = engine is None or isinstance(engine, LocalEngine)
    backbone = backbone or (spec if is_here else replace(spec, device="cpu")).load()
    on_model(backbone.layout)
    for note in backbone.layout.notes:
        on_message(f"{backbone.identity.name}: {note}")
    before = begun(store, on_message)
    options = continued(options, before)
    manifest = planned(items, backbone, options)
    with writing(store):
        if (now := begun(store)) != before:
            # another call ended after the folder was looked at
            before, options = now, continued(options, now)
            manifest = planned(items, backbone, options)
        require_same(store, before, manifest, items)
        remove_unfinished(store)
        if before is None:
            manifest.write(store)
        write_listing(store, items)
        kept, remade = whole_shards(store, manifest, before, on_message)
        require_unchanged(items, manifest, kept)
        if not options.skip_bad:
            require_readable(items, manifest, set(kept), [bad for shard in kept.values() for bad in left_out(shard)])
        job = Job(store.absolute(), spec, manifest, options.skip_bad)
        written, computed = run(items, job, set(kept), engine or LocalEngine(backbone), on_progress)
        complete = completed(store, manifest, written)
        complete.write(store)
        seconds = time.perf_counter() - start
        write_times(store, computed, seconds)
    bad = [bad for shard in finished_shards(store).values() for bad in left_out(shard)]
    if len(bad) == len(items):
        raise InputError(f"data: none of {len(items):,} items can be read; the first, {bad[0][0]!r}, {bad[0][1]}")
    return Extracted(store, complete, len(written), len(kept), remade, tuple(bad), seconds)
