"""Words for a terminal, as they are."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text that may hold names of files: brackets and colons stand for themselves, and no path is broken in two.

    >>> say(Console(width=12), "runs[/1]/:x: is kept as it is")
    runs[/1]/:x: is kept as it is
    """
    console.print(Text(text, style), soft_wrap=True)
