"""Raw data and a model -> tokens, as a terminal sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from cenote.cli import interrupts
from cenote.cli.console import clock, say, sized
from cenote.cli.options import parsed_size, split_names
from cenote.cli.progress import items_bar

if TYPE_CHECKING:
    from cenote.features.raw import RawItems
    from cenote.jobs.extract import Extracted, Progress

LISTED = 20


def listed(
    data: str,
    console: Console,
    *,
    kind: str | None,
    labels: Path | None,
    column: str | None,
    names: str | None,
    id_column: str | None,
    limit: int | None,
    max_item_size: str,
) -> RawItems:
    """The raw items that lie there, told."""
    from cenote.features.raw import open_raw

    with console.status(Text(f"listing {data}")):
        items = open_raw(
            data, kind=kind, labels=labels, column=column, names=split_names(names), id_column=id_column, limit=limit,
            max_item_size=parsed_size(max_item_size),
        )  # fmt: skip
    say(console, f"{len(items):,} items: {items.format}")
    return items


@contextmanager
def extracting(console: Console, items: int | None, out: Path | None) -> Iterator[Callable[[Progress], None]]:
    """A line that tells rate and time left; who interrupts it is told what is kept, where something is."""
    with items_bar(console, items) as on_items:

        def on_progress(now: Progress) -> None:
            told = f"{now.done:,} of {now.items:,}, {now.rate:.1f} items/s, {clock(now.left)} left"
            on_items("extracting", now.done, told, now.items)

        try:
            yield on_progress
        except KeyboardInterrupt:
            if out is not None:
                interrupts.tell(f"finished shards are kept in {out}; run the same command again to go on")
            raise


def tell(done: Extracted, console: Console) -> None:
    """What was done, and what was left out."""
    shards = done.manifest.shards or ()
    rate = f", {sum(s.rows for s in shards) / done.seconds:.1f} items/s" if done.computed and not done.kept else ""
    say(
        console,
        f"{sum(s.rows for s in shards):,} items, {sum(s.tokens for s in shards):,} tokens, "
        f"{sized(sum(s.bytes for s in shards))}: {done.store} ({done.computed} shards made, {done.kept} kept, "
        f"{clock(done.seconds)}{rate})",
    )
    if cut := sum(s.shortened for s in shards):
        say(console, f"{cut:,} items were longer than the model takes, and were cut")
    if done.skipped:
        say(console, f"{len(done.skipped):,} unreadable items were left out:")
        for name, why in done.skipped[:LISTED]:
            say(console, f"  {name}: {why}")
        if len(done.skipped) > LISTED:
            say(console, f"  ... and {len(done.skipped) - LISTED:,} more")
