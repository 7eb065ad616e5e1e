"""Apply a function to a few sets at a time, so that everything between tokens and result stays in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cenote.core.sets import Bags, PaddedTokens, Tokens

NUMBERS_AT_ONCE = 2**19


def by_sets(function: Callable[[Tokens], Tensor], tokens: Tokens, numbers_at_once: int = NUMBERS_AT_ONCE) -> Tensor:
    """`function(tokens)`, a few sets at a time; a huge set goes through alone.

    `function` gives one row per set, and no set may see another. Compiled and exported programs, and sets on a GPU, go through
    in one piece.
    """
    x = tokens.values
    if x.device.type != "cpu" or x.numel() <= numbers_at_once or torch.compiler.is_compiling():
        return function(tokens)
    return torch.cat([function(part) for part in _parts(tokens, numbers_at_once)])


def _parts(tokens: Tokens, numbers: int) -> Iterator[Tokens]:
    x = tokens.values
    if isinstance(tokens, Bags):
        lengths = tokens.lengths().tolist()
        groups, held = [[0]], 0
        for i, length in enumerate(lengths):
            if i and held + length * tokens.dim > numbers:
                groups.append([0])
                held = 0
            groups[-1].append(groups[-1][-1] + length)
            held += length * tokens.dim
        for offsets, values in zip(groups, x.split([g[-1] for g in groups]), strict=True):
            yield Bags(values, torch.tensor(offsets))
        return
    assert isinstance(tokens, PaddedTokens)
    step = max(1, numbers // max(1, x[0].numel()))
    # split and not slices: the gradient of each slice would be as large as all sets together
    for i, values in enumerate(x.split(step)):
        part = tokens.part(slice(i * step, (i + 1) * step))
        part.values = values
        yield part
