"""A row times a product of attention matrices, none of which is ever there as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Callable[[int, int], Tensor]
"""From the first and the last row, exclusive, to these rows of a layer's matrix, `[batch, rows, tokens]`."""

BLOCK = 256
"""Rows that are there at a time."""


def chained(
    row: Float[Tensor, "batch tokens"], layers: Sequence[Rows], block: int = BLOCK
) -> Float[Tensor, "batch tokens"]:
    """`row A_L ... A_1`, in memory of `block` rows of one layer.

    A layer's rows that the row so far gives no weight, in no item of the batch, are not asked for: the last of a chain often
    starts from one.

    Args:
        row: where the chain starts, at the top.
        layers: from the lowest to the top.
        block: rows that are computed at a time.

    Example:
        >>> a, b = torch.rand(2, 1, 5, 5, dtype=torch.float64).unbind()
        >>> start = torch.eye(5, dtype=torch.float64)[None, 2]
        >>> there = chained(start, [lambda i, j: a[:, i:j], lambda i, j: b[:, i:j]], block=2)
        >>> torch.allclose(there, (b @ a)[:, 2])
        True
    """
    for rows in reversed(layers):
        found = torch.zeros_like(row)
        for start in range(0, row.shape[1], block):
            part = row[:, start : start + block]
            if part.any():
                found = found + torch.einsum("br,brt->bt", part, rows(start, start + part.shape[1]).to(row.dtype))
        row = found
    return row
