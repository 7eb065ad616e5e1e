"""How far a job is, for a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cenote.cli.console import clock


@contextmanager
def arms_bar(console: Console, count: int) -> Iterator[Callable[[str, float], None]]:
    """A bar of so many arms, of which several may be in hand: call what is given with an arm's name and its share done."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=count, told="")
        pace = Pace(count)

        def on_arm(name: str, share: float) -> None:
            pace.update(name, share, time.perf_counter())
            progress.update(bar, description=pace.names() or name, completed=pace.work, told=pace.told())

        yield on_arm


@contextmanager
def items_bar(console: Console, count: int | None) -> Iterator[Callable[..., None]]:
    """A bar of so many items, or as many as is told: call what is given with what is done,
    how many are done, words beside the bar, and of how many where that was not known."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading", total=count, told="")

        def on_items(doing: str, done: int, told: str, of: int | None = None) -> None:
            progress.update(bar, description=doing, completed=done, told=told, total=of)

        yield on_items


class Pace:
    """How far `count` arms are, several of them at once, and how long the others will take.

    >>> pace = Pace(10)
    >>> for now, name, share in ((0, "found", 1), (0, "max", 0), (30, "max", 0.5), (60, "max", 1), (60, "gem", 0.5)):
    ...     pace.update(name, share, now)
    >>> pace.told()
    '2 of 10, 1.5/min, 5:00 min left'
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.done: set[str] = set()
        self.running: dict[str, float] = {}
        self.began: tuple[float, float] | None = None
        self.rate = 0.0

    @property
    def work(self) -> float:
        """Arms that are done, and the shares of those in hand."""
        return len(self.done) + sum(self.running.values())

    def update(self, name: str, share: float, now: float) -> None:
        """That so much of an arm was done at a time, in seconds."""
        if share < 1 and self.began is None:
            # what an earlier run had finished took no time, and says nothing of the others
            self.began = now, self.work
        self.running.pop(name, None)
        if share >= 1:
            self.done.add(name)
        else:
            self.running[name] = share
        if self.began is not None and now > self.began[0]:
            self.rate = (self.work - self.began[1]) / (now - self.began[0])

    def names(self) -> str:
        """Of those in hand, the last told of first, cut where they are many."""
        first, *others = [*reversed(self.running)] or [""]
        return f"{first} and {len(others)} more" if len(others) > 1 else ", ".join([first, *others])

    def told(self) -> str:
        """For a line in a terminal."""
        if self.rate <= 0:
            return f"{len(self.done)} of {self.count}"
        left = clock((self.count - self.work) / self.rate)
        return f"{len(self.done)} of {self.count}, {60 * self.rate:.1f}/min, {left} left"
