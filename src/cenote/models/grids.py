"""How many leading tokens are no patches, and which grid the others form: read off the shapes, never off a name."""

from __future__ import annotations

from typing import Any, NamedTuple

MOST_PREFIX_TOKENS = 16
UNEVEN = 0.1
"""How far a grid's proportions may be from the input's: patches are whole, the input need not be."""


class Lie(NamedTuple):
    """Prefix tokens, grid, and whether that had to be guessed."""

    prefix_tokens: int
    grid: tuple[int, int] | None
    note: str | None = None


def lie(tokens: int, height: int, width: int, patch: Any = None) -> Lie:
    """How `tokens` tokens of an input of `height` x `width` lie.

    With the patch size from the model's configuration, if that explains the count; else the smallest prefix that leaves a
    grid with the input's proportions.

    >>> lie(201, 224, 224, 16)
    Lie(prefix_tokens=5, grid=(14, 14), note=None)
    >>> lie(49, 224, 224, 4)
    Lie(prefix_tokens=0, grid=(7, 7), note=None)
    """
    sizes = _pair(patch)
    if sizes is not None:
        grid = height // sizes[0], width // sizes[1]
        extra = tokens - grid[0] * grid[1]
        if 0 <= extra <= MOST_PREFIX_TOKENS and min(grid) > 0:
            return Lie(extra, grid)
    for prefix in range(min(MOST_PREFIX_TOKENS, tokens - 1) + 1):
        patches = tokens - prefix
        rows = round((patches * height / width) ** 0.5)
        if rows and patches % rows == 0 and abs(patches // rows / rows * height / width - 1) < UNEVEN:
            # a single patch has every proportion
            if patches == 1 and tokens > 1:
                break
            note = None if prefix <= 1 else f"{prefix} prefix tokens are a guess from the number of tokens, {tokens}"
            return Lie(prefix, (rows, patches // rows), note)
    return Lie(0, None, f"{tokens} tokens form no grid of {height} x {width} pixels; the prefix tokens are not known")


def _pair(patch: Any) -> tuple[int, int] | None:
    if isinstance(patch, int) and patch > 0:
        return patch, patch
    if isinstance(patch, list | tuple) and len(patch) == 2 and all(isinstance(p, int) and p > 0 for p in patch):
        return int(patch[0]), int(patch[1])
    return None
