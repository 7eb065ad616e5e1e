"""How much of a decoder's attention falls on the keys that a choice of few leaves it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Coverage(NamedTuple):
    """Means over queries and heads.

    Attributes:
        mass: of the attention, what falls on kept keys.
        inner: the same without the keys that any rule keeps: of what falls on all others, the share on kept ones.
        share: of the keys that may be read, those that are kept.
    """

    mass: float
    inner: float
    share: float


def covered_mass(
    weights: Float[Tensor, "batch heads queries keys"],
    kept: Bool[Tensor, "batch #heads queries keys"],
    always: Bool[Tensor, "*_batch queries keys"] | None = None,
    may: Bool[Tensor, "*_batch queries keys"] | None = None,
) -> Coverage:
    """What kept keys have of the true attention.

    Args:
        weights: true ones, of all keys; rows of zeros are left out.
        kept: which keys a choice reads.
        always: keys that any rule keeps, see `ends`.
        may: keys that may be read; those with a weight by default.

    Example:
        >>> weights = torch.tensor([[[[0.5, 0.3, 0.2]]]])
        >>> kept = torch.tensor([[[[True, False, True]]]])
        >>> tuple(round(x, 2) for x in covered_mass(weights, kept, always=torch.tensor([[True, False, False]])))
        (0.7, 0.4, 0.67)
    """
    may = weights > 0 if may is None else may.expand_as(weights)
    rows = weights.sum(-1) > 0
    kept = kept & may
    mass = (weights * kept).sum(-1)[rows].mean()
    other = torch.ones_like(may) if always is None else ~always.to(may.device).expand_as(weights)
    there = (weights * other).sum(-1)
    inner = (weights * other * kept).sum(-1)
    some = rows & (there > 0)
    share = kept.sum() / may.sum().clamp(min=1)
    return Coverage(float(mass), float((inner[some] / there[some]).mean()), float(share))


def ends(queries: int, keys: int, block: int) -> Bool[Tensor, "queries keys"]:
    """The first block, and the query's own: what any rule keeps. The queries are the last tokens.

    >>> ends(1, 5, 2).int().tolist()
    [[1, 1, 0, 0, 1]]
    """
    own = torch.arange(keys) // block
    return (own == 0) | (own == own[keys - queries :, None])
