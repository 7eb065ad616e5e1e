"""A worker: holds the model, turns a shard of raw items into a file of tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from threading import Event, Lock
from typing import Any

import torch
from torch import Tensor

from cenote.catalog import method
from cenote.core import InputError
from cenote.core.memory import HeldMemory
from cenote.features.raw import Item, Read, UnreadableError
from cenote.features.store import Rows, ShardEntry, write_shard
from cenote.features.store.pages import Collected, Pages
from cenote.features.store.shards import DTYPES
from cenote.jobs.extract.spec import Job, Shard
from cenote.models import Backbone, Prepared, States
from cenote.pool.fitting import FittedPool, Known, named_pool, width

OnItems = Callable[[int], None]
"""Called with the number of items that were just computed."""


class Worker:
    """Computes shards of one job, one after the other.

    Args:
        job: what to compute.
        backbone: the model, if it is loaded already.

    Raises:
        InputError: where the model is not the one that the job was made for.
    """

    def __init__(self, job: Job, backbone: Backbone | None = None) -> None:
        self.job = job
        self.backbone = backbone or job.model.load()
        for name, what in (("weights", "weights"), ("config", "settings"), ("code", "code")):
            if getattr(self.backbone.identity, f"{name}_sha256") != job.manifest.model.get(f"{name}_sha256"):
                raise InputError(
                    f"backbone: {job.model.name} has other {what} here than where the job was started; "
                    f"give every machine the same model"
                )
        self.key = job.manifest.key()
        self.dtype = DTYPES[job.manifest.dtype]
        self.pages = Pages(job.manifest.dim, self.dtype)
        # a pooled store has no prefix tokens any more; the model has
        self.pool = token_pool(job.manifest.pooled, job.manifest.dim, self.backbone.layout.prefix_tokens)
        self.held, self.computed = HeldMemory(), 0
        # two batches at a time keep two halves of the threads busier than one batch keeps all of them
        other = self.backbone.twin() if torch.get_num_threads() > 1 else None
        self.lanes = [self.backbone] if other is None else [self.backbone, other]

    def __call__(self, shard: Shard, on_items: OnItems = lambda _: None) -> ShardEntry:
        """Compute one shard and write it; nothing is there until all of it is.

        Raises:
            InputError: where an item cannot be read (and is not to be skipped), a number does not fit the store's type, or
                the disk is full.
        """
        return self.write(shard, self.rows(shard.items, on_items))

    def write(self, shard: Shard, rows: Rows) -> ShardEntry:
        """Put the tokens of a shard on disk.

        Raises:
            InputError: where the disk is full.
        """
        try:
            return write_shard(self.job.store, shard.number, self.key, rows, self.job.manifest.dtype)
        finally:
            rows.tokens.free()

    def rows(self, items: Sequence[Item], on_items: OnItems = lambda _: None) -> Rows:
        """The tokens of some items; `rows.tokens.free()` when they are no longer needed."""
        read: dict[int, bytes] = {}
        skipped: list[tuple[str, str]] = []
        places: dict[int, tuple[int, int]] = {}
        tokens, cut = Collected(self.pages, self.job.manifest.layers), 0
        batches = _ahead(self._batches(items, read, skipped))
        one, stopped = Lock(), Event()

        def work(backbone: Backbone) -> None:
            nonlocal cut
            try:
                while not stopped.is_set():
                    with one:
                        self.held.settle()
                        if (batch := next(batches, None)) is None:
                            return
                    positions, prepared = batch
                    lengths, begin = self._compute(backbone, prepared, tokens, [items[i].id for i in positions])
                    with one:
                        cut += prepared.cut
                        places.update(
                            zip(
                                positions,
                                zip(accumulate(lengths[:-1], initial=begin), lengths, strict=True),
                                strict=True,
                            )
                        )
                        on_items(len(positions))
            except BaseException:
                stopped.set()
                raise

        in_lanes(work, self.lanes)
        # one shard may be written while the next is computed
        self.computed += 1
        self.held.learning = self.computed < 2
        order = sorted(read)
        return Rows(
            ids=[items[i].id for i in order],
            inputs=[read[i] for i in order],
            starts=[places[i][0] for i in order],
            lengths=[places[i][1] for i in order],
            tokens=tokens,
            skipped=skipped,
            shortened=cut,
        )

    def _compute(
        self, backbone: Backbone, prepared: Prepared, tokens: Collected, names: Sequence[str]
    ) -> tuple[list[int], int]:
        """Put the tokens of a batch among the others: how many of each item, and where they begin."""
        found = backbone.states(prepared, self.job.manifest.layers)
        real = None if self.pool is not None or found.mask is None else _Real(found.mask)
        lengths = self._lengths(found, real)
        begin = tokens.reserve(sum(lengths))
        for layer, states in found.layers.items():
            kept = self._kept(states, found.mask, real)
            if not all(_finite(piece) for piece in tokens.put(layer, begin, kept)):
                self._refuse(names, self._kept(states, found.mask, real), lengths)
        return lengths, begin

    def _batches(
        self, items: Sequence[Item], read: dict[int, bytes], skipped: list[tuple[str, str]]
    ) -> Iterator[tuple[list[int], Prepared]]:
        size = self.job.manifest.batch
        if self.job.manifest.kind == "image":
            # images are large until they are prepared: a batch at a time
            for start in range(0, len(items), size):
                yield from self._prepared(range(start, min(start + size, len(items))), items, read, skipped)
            return
        contents = self._read(range(len(items)), items, read, skipped)
        for group in of_like_length(contents, size, self.backbone.equal_sizes):
            yield group, self.backbone.prepare([contents[i] for i in group])

    def _prepared(
        self, places: Sequence[int], items: Sequence[Item], read: dict[int, bytes], skipped: list[tuple[str, str]]
    ) -> Iterator[tuple[list[int], Prepared]]:
        contents = self._read(places, items, read, skipped)
        if contents:
            yield list(contents), self.backbone.prepare(list(contents.values()))

    def _read(
        self, places: Sequence[int], items: Sequence[Item], read: dict[int, bytes], skipped: list[tuple[str, str]]
    ) -> dict[int, Any]:
        contents: dict[int, Any] = {}
        for place in places:
            try:
                found: Read = items[place].read()
            except UnreadableError as error:
                if not self.job.skip_bad:
                    raise InputError(
                        f"item {items[place].id!r} {error}; repair it, take it out, or leave such items out with --skip-bad"
                    ) from error
                skipped.append((items[place].id, str(error)))
                continue
            contents[place], read[place] = found.content, found.digest
        return contents

    def _kept(self, states: Tensor, mask: Tensor | None, real: _Real | None) -> Iterable[Tensor]:
        """What is stored of a batch, its real tokens or their pools, one item after the other."""
        if self.pool is not None:
            with torch.inference_mode():
                return (self._here(self.pool.pooled(states.float(), mask)),)
        if real is None:
            return (self._here(states.flatten(0, 1)),)
        if real.lead and states.device.type == "cpu":
            return (tokens[:length] for tokens, length in zip(states, real.lengths, strict=True))
        return (self._here(states.flatten(0, 1)[real.places]),)

    def _here(self, rows: Tensor) -> Tensor:
        # across a bus, the smaller type travels
        return rows if rows.device.type == "cpu" else rows.to(self.dtype).cpu()

    def _lengths(self, found: States, real: _Real | None) -> list[int]:
        if real is not None:
            return real.lengths
        items, tokens = next(iter(found.layers.values())).shape[:2]
        return [tokens if self.pool is None else 1] * items

    def _refuse(self, names: Sequence[str], kept: Iterable[Tensor], lengths: list[int]) -> None:
        of_items = torch.cat([piece.to(self.dtype) for piece in kept]).split(lengths)
        for name, tokens in zip(names, of_items, strict=True):
            if not _finite(tokens):
                raise InputError(
                    f"item {name!r}: its tokens hold NaN, or numbers beyond the range of "
                    f"{self.job.manifest.dtype}; take bfloat16 or float32 with --dtype, or leave the item out"
                )


class _Real:
    """Where the real tokens of a padded batch stand, found once for all layers."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.lengths: list[int] = mask.sum(1).tolist()
        self.lead = bool((mask[:, 1:] <= mask[:, :-1]).all())

    @cached_property
    def places(self) -> Tensor:
        return self.mask.flatten().nonzero().squeeze(1)


def _finite(rows: Tensor) -> bool:
    # NaN and infinity survive in the smallest and the largest number
    return not rows.numel() or all(math.isfinite(float(end)) for end in rows.aminmax())


def token_pool(name: str | None, dim: int, prefix_tokens: int) -> FittedPool | None:
    """The pool of that name, for tokens as they come from a model.

    Raises:
        InputError: where it has something to learn, or is none of sets of tokens.
    """
    if name is None:
        return None
    if (kind := method(name).kind) != "sets":
        raise InputError(f"pool-at-extract: {name} pools {kind}; name a pool of sets (cenote list)")
    pool = named_pool(name, Known(dim, prefix_tokens), {})
    if any(True for _ in pool.parameters()):
        raise InputError(f"pool-at-extract: {name} has weights that must be trained first; take mean, max, cls, ...")
    if width(pool) != dim:
        raise InputError(f"pool-at-extract: {name} gives {width(pool)} numbers for tokens of {dim}")
    if pool.reads_cls and not prefix_tokens:
        raise InputError(f"pool-at-extract: {name} reads [CLS], and this model has no prefix tokens")
    return FittedPool(pool.eval(), prefix_tokens)


def of_like_length(contents: dict[int, Any], size: int, equal: bool) -> list[list[int]]:
    """Batches of items of similar length, or of exactly one length; the same for the same items.

    The longest come first: memory that held them holds the others, and threads that end a shard together wait for short ones.
    """
    lengths = {place: _length(content) for place, content in contents.items()}
    order = sorted(contents, key=lambda place: (lengths[place], place))
    if not equal:
        return [order[i : i + size] for i in range(0, len(order), size)][::-1]
    of_length: dict[Any, list[int]] = defaultdict(list)
    for place in order:
        of_length[lengths[place]].append(place)
    return [group[i : i + size] for group in of_length.values() for i in range(0, len(group), size)][::-1]


def _length(content: Any) -> tuple[int, int]:
    return (len(content), 0) if isinstance(content, str) else (len(content[0]), content[1])


def in_lanes(work: Callable[[Backbone], None], lanes: Sequence[Backbone]) -> None:
    """Do the work in several threads at once, this one among them, which share the cores."""
    if len(lanes) == 1:
        work(lanes[0])
        return
    before = torch.get_num_threads()
    each = before // len(lanes)

    def beside(backbone: Backbone) -> None:
        # a thread takes the process's number when it first asks, so it must ask before it is told its own
        torch.get_num_threads()
        torch.set_num_threads(each)
        work(backbone)

    torch.set_num_threads(each)
    try:
        with ThreadPoolExecutor(len(lanes) - 1) as threads:
            others = [threads.submit(beside, backbone) for backbone in lanes[1:]]
            work(lanes[0])
        for other in others:
            other.result()
    finally:
        torch.set_num_threads(before)


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same, with the next one being made while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
