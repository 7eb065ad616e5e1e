"""Arms and what was measured of them, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import rich.box
from rich.table import Table
from rich.text import Text

WIDE = 100
"""Columns of a terminal that has room for the whole table."""


def leaderboard(
    columns: Mapping[str, Sequence[str]],
    width: int,
    *,
    title: str,
    caption: str,
    luxuries: Sequence[str] = (),
    spared: Sequence[str] = (),
) -> Table:
    """A row per arm in a table for a terminal of so many columns; what does not fit is left out, and no cell is cut.

    Args:
        columns: heading -> a cell per arm, in the order of the rows; the first names the arms.
        width: of the terminal.
        title: above the table.
        caption: below it.
        luxuries: headings that only a wide terminal shows.
        spared: headings that are left out while the others do not fit, the first one first.

    Example:
        >>> arms = {"method": ["abmil", "mean"], "AUROC": ["0.93", "0.81"], "params": ["1,024", "0"]}
        >>> [c.header for c in leaderboard(arms, 20, title="", caption="", spared=["params"]).columns]
        ['method', 'AUROC']
    """
    shown = {name: cells for name, cells in columns.items() if width >= WIDE or name not in luxuries}
    for name in spared:
        # a space on each side of a column, and one at the edge
        if sum(max(map(len, (head, *cells))) + 2 for head, cells in shown.items()) + 1 > width:
            shown.pop(name)
    table = Table(
        title=Text(title, "table.title"),
        caption=caption,
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for number, name in enumerate(shown):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table
