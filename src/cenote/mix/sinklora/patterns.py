"""Sparse patterns that groups are measured against: as masks, at the cost of a group.

Source: Child et al., "Generating Long Sequences with Sparse Transformers" (2019), for the fixed and the strided one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from cenote.core.requirements import require_at_least, require_one_of

Kind = Literal["window", "fixed", "strided", "random"]


@dataclass(frozen=True)
class Pattern:
    """Which earlier tokens each reads, about `group` of them, the same in all heads.

    Args:
        kind: `"window"`: the last `group` tokens; `"fixed"`: the tokens of its own block of half a group, and the last ones of
            earlier blocks; `"strided"`: the last half of a group, and tokens at even distances before; `"random"`: the last
            half of a group, and as many others by lot.
        group: tokens that are read, about.
        seed: of `"random"`.

    Raises:
        InputError: for another kind, or fewer than two tokens.

    Example:
        >>> Pattern("window", group=2).readable(heads=1, tokens=4)[0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """

    kind: Kind
    group: int
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of(get_args(Kind), kind=self.kind)
        require_at_least(2, group=self.group)

    def readable(
        self, heads: int, tokens: int, device: torch.device | None = None
    ) -> Bool[Tensor, "heads tokens tokens"]:
        """Which tokens each reads."""
        at = torch.arange(tokens, device=device)
        behind = at[:, None] - at
        half = self.group // 2
        if self.kind == "window":
            may = behind < self.group
        elif self.kind == "fixed":
            every = max(1, tokens // half)
            last = at % half >= half - max(1, half // every)
            may = (at[:, None] // half == at // half) | last
        elif self.kind == "strided":
            may = (behind < half) | (behind % max(1, tokens // half) == 0)
        else:
            drawn = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(self.seed)).to(at.device)
            others = drawn.masked_fill(behind < half, 2.0)
            may = (behind < half) | (others.argsort(-1).argsort(-1) < half)
        return (may & (behind >= 0)).expand(heads, -1, -1)
