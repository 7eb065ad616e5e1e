"""What an extraction would take, measured on a sample of its items."""

from __future__ import annotations

import os
import time
from pathlib import Path

from cenote.core import InputError
from cenote.features.raw import RawItems
from cenote.jobs.extract.plan import Options, itemsize, planned, spread
from cenote.jobs.extract.result import Estimate
from cenote.jobs.extract.resume import begun, continued, lowest, require_same, require_usable
from cenote.jobs.extract.spec import Job, ModelSpec
from cenote.jobs.extract.work import Worker
from cenote.models import Backbone

SAMPLED_FOR_TIME = 64


def estimate(
    items: RawItems, spec: ModelSpec, out: Path, options: Options, backbone: Backbone | None = None
) -> Estimate:
    """Items, tokens, bytes and time, from a timed sample of items spread over all; nothing is written.

    Raises:
        InputError: where `extract` with the same arguments would, so far as can be told before it runs.
    """
    require_usable(out)
    backbone = backbone or spec.load()
    before = begun(out)
    manifest = planned(items, backbone, continued(options, before))
    require_same(out, before, manifest, items)
    worker = Worker(Job(out, spec, manifest, skip_bad=True), backbone)
    sample = spread(items.items, SAMPLED_FOR_TIME)
    worker.rows(sample[: min(len(sample), manifest.batch)])
    start = time.perf_counter()
    rows = worker.rows(sample)
    seconds = time.perf_counter() - start
    if not rows.ids:
        name, why = rows.skipped[0]
        raise InputError(f"data: none of {len(sample)} sampled items can be read; the first, {name!r}, {why}")
    share = len(items) / len(rows.ids)
    tokens = round(sum(rows.lengths) * share)
    free = os.statvfs(lowest(out))
    return Estimate(
        items=len(items),
        tokens=tokens,
        bytes=tokens * len(manifest.layers) * manifest.dim * itemsize(manifest.dtype),
        seconds=seconds * len(items) / len(sample),
        sampled=len(sample),
        shards=manifest.shard_count,
        free_bytes=free.f_bavail * free.f_frsize,
    )
