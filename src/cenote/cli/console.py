"""Words for a terminal, as they are; durations and sizes in words."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.text import Text


def talking(as_json: bool) -> Console:
    """Where a command speaks to people: not where machines read."""
    return Console(stderr=as_json)


def emit(facts: Any) -> None:
    """What a command found, for machines; paths are told as text."""
    typer.echo(json.dumps(facts, indent=1, default=str))


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text that may hold names of files: brackets and colons stand for themselves, and no path is broken in two.

    >>> say(Console(width=12), "runs[/1]/:x: is kept as it is")
    runs[/1]/:x: is kept as it is
    """
    console.print(Text(text, style), soft_wrap=True)


def clock(seconds: float) -> str:
    """A duration as people say it.

    >>> clock(8.2), clock(125), clock(7260), clock(float("inf"))
    ('8 s', '2:05 min', '2:01 h', 'unknown')
    """
    if seconds == float("inf"):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def sized(count: int) -> str:
    """Bytes as people say them.

    >>> sized(1_500_000)
    '1.5 MB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
