"""Everything that is wrong with the input, told at once and before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from cenote.core import InputError

LISTED = 10
NAMED = 5


class Problems:
    """Problems found so far, each naming the item and the remedy.

    Args:
        where: what is being read, for the head of the message.

    Example:
        >>> problems = Problems("bags")
        >>> problems.add("empty", "item 'a': has no tokens; leave it out")
        >>> problems.raise_any()
        Traceback (most recent call last):
        cenote.core.errors.InputError: bags: item 'a': has no tokens; leave it out
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._by_kind: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return sum(len(found) for found in self._by_kind.values())

    def add(self, kind: str, text: str) -> None:
        """Note a problem; kinds take turns in the message, so that a frequent one does not hide the others."""
        self._by_kind.setdefault(kind, []).append(text)

    def raise_any(self) -> None:
        """Raise one `InputError` that lists the problems, if there are any."""
        if not self._by_kind:
            return
        rounds = zip_longest(*self._by_kind.values())
        in_turn = [text for one_of_each in rounds for text in one_of_each if text is not None]
        if len(in_turn) == 1:
            raise InputError(f"{self.where}: {in_turn[0]}")
        lines = [f"{self.where}: {len(in_turn)} problems", *(f"  - {text}" for text in in_turn[:LISTED])]
        if len(in_turn) > LISTED:
            lines.append(f"  ... and {len(in_turn) - LISTED} more")
        raise InputError("\n".join(lines))


def some(names: Iterable[object]) -> str:
    """The first few names, for a message.

    >>> some(range(7))
    '0, 1, 2, 3, 4 and 2 more'
    """
    texts = [str(n) for n in names]
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return ", ".join(texts[:NAMED]) + more


def check_ids(ids: Sequence[str], problems: Problems) -> None:
    """Every item has a name of its own."""
    for name, count in Counter(ids).items():
        if not name:
            problems.add("no id", f"{count} rows have no id; give each item a name")
        elif not _is_text(name):
            problems.add("name", f"the name {name!a} is no UTF-8 text; rename the item")
        elif count > 1:
            problems.add("duplicate id", f"id {name!r} stands {count} times; keep one row per item")


def _is_text(name: str) -> bool:
    """Whether a name can be written: that of a file may hold any bytes.

    >>> _is_text("snö"), _is_text("sn" + chr(0xDCF6))
    (True, False)
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_lengths(ids: Sequence[str], lengths: Sequence[int], prefix_tokens: int, problems: Problems) -> None:
    """Every item has a token beyond the prefix."""
    for name, length in zip(ids, lengths, strict=True):
        if length == 0:
            problems.add("empty", f"item {name!r} has no tokens; leave it out")
        elif length <= prefix_tokens:
            problems.add(
                "only prefix",
                f"item {name!r} has {length} tokens, all of them prefix (prefix_tokens={prefix_tokens}); "
                f"give a smaller prefix_tokens or leave it out",
            )


def check_grid(grid: tuple[int, int] | None, prefix_tokens: int, lengths: Sequence[int], problems: Problems) -> None:
    """The patch tokens of every item fill the grid."""
    if grid is None:
        return
    expected = prefix_tokens + grid[0] * grid[1]
    others = sorted(set(lengths) - {expected})
    if others:
        problems.add(
            "grid",
            f"grid {grid[0]} x {grid[1]} with prefix_tokens={prefix_tokens} means {expected} tokens per item, but items have "
            f"{some(others)}; leave grid out or correct it",
        )


def check_groups(ids: Sequence[str], groups: Sequence[str], split: Sequence[int], problems: Problems) -> None:
    """No group stands on two sides of a split."""
    from cenote.features.dataset import SPLITS

    sides: dict[str, set[int]] = {}
    for group, side in zip(groups, split, strict=True):
        sides.setdefault(group, set()).add(side)
    for group, found in sides.items():
        if len(found) > 1:
            members = [name for name, g in zip(ids, groups, strict=True) if g == group]
            problems.add(
                "group on two sides",
                f"group {group!r} stands in {' and '.join(SPLITS[s] for s in sorted(found))} ({some(members)}); "
                f"move it to one of them, or leave the split out to have whole groups split",
            )
