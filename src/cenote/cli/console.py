"""Words for a terminal, as they are; durations and sizes in words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from cenote.core.json_text import json_text

STEERING = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the order of others around."""


class PlainConsole(Console):
    """A console whose colours are its own: what a text holds for a terminal to obey is shown, not obeyed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of what is printed."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style, control)


def talking(as_json: bool) -> Console:
    """Where a command speaks to people: not where machines read."""
    return PlainConsole(stderr=as_json)


def plain(text: str) -> str:
    """A text from names and labels of others, as a terminal may have it: lines and tabs stay, other controls are spelled out.

    >>> plain("a\\x1b[31mb\\n")
    'a\\\\x1b[31mb\\n'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    return character in STEERING or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")


def emit(facts: Any) -> None:
    """What a command found, for machines; paths are told as text."""
    typer.echo(json_text(facts, indent=1, default=str))


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


def rounded_p(p: float) -> str:
    """A p-value, of which nobody believes the digits where it is small.

    >>> rounded_p(0.0421), rounded_p(0.0002)
    ('0.042', '<0.001')
    """
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def signed(value: float, digits: int) -> str:
    """A difference with its sign; what rounds to nothing has no minus.

    >>> signed(0.25, 1), signed(-0.2, 0)
    ('+0.2', '+0')
    """
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def sized(count: int) -> str:
    """Bytes as people say them.

    >>> sized(1_500_000)
    '1.5 MB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
