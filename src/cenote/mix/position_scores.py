"""Scores of attention with the usual positions: none, a table of distances, rotations. What new ones are compared with."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.mix.base import ScoreModifier

Positions = tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch keys"]]
Stretch = Literal["none", "interpolated", "yarn"]


def positions_of(q: Tensor, k: Tensor, positions: Positions | None) -> Positions:
    """Of queries and keys; keys from 0, and queries that are the last of them, where none are given."""
    if positions is not None:
        return positions
    keys = torch.arange(k.shape[-2], device=k.device)[None]
    if q.shape[-2] > k.shape[-2]:
        raise InputError(f"positions: {q.shape[-2]} queries and {k.shape[-2]} keys; say where they stand")
    return keys[:, k.shape[-2] - q.shape[-2] :], keys


def distances(q: Tensor, k: Tensor, positions: Positions | None) -> Int[Tensor, "#batch 1 queries keys"]:
    """`m - n` of each query at m and key at n."""
    of_queries, of_keys = positions_of(q, k, positions)
    return (of_queries[:, :, None] - of_keys[:, None, :])[:, None]


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """-inf where the mask is False."""
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


class DotProduct(ScoreModifier):
    """`q . k / sqrt(d)`: no position."""

    def forward(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch heads keys width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: Positions | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "batch heads queries keys"]:
        return masked(q @ k.mT / math.sqrt(q.shape[-1]), mask)


class RelativeTable(ScoreModifier):
    """`(q_i . k_j + q_i . r[i - j]) / sqrt(d)`, r learned, 0 at the start.

    Args:
        width: of a head.
        distances: how many the table has; what is further shares the last, what lies ahead the first.
    """

    def __init__(self, width: int, distances: int) -> None:
        super().__init__()
        require_at_least(1, width=width, distances=distances)
        self.table = nn.Parameter(torch.zeros(width, distances))

    def forward(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch heads keys width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: Positions | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        return masked((q @ k.mT + self.added(q, k, positions)) / math.sqrt(q.shape[-1]), mask)

    def added(self, q: Tensor, k: Tensor, positions: Positions | None) -> Float[Tensor, "batch heads queries keys"]:
        """`q_i . r[i - j]`."""
        at = distances(q, k, positions).clamp(0, self.table.shape[1] - 1)
        return (q @ self.table).gather(-1, at.expand(*q.shape[:2], -1, -1))


class Rotary(ScoreModifier):
    """`R_m q . R_n k / sqrt(d)`: pairs of channels turned by position times `base^(-2 i / d)` (RoPE).

    Args:
        width: of a head; even.
        base: of the frequencies; larger ones turn slower.
        stretch: how a model goes on behind the length `trained`, `factor` times as far: `"interpolated"` divides all
            frequencies (position interpolation), `"yarn"` divides those that turn less than once within `trained`, leaves
            those that turn 32 times or more, ramps between, and sharpens the scores by `(0.1 ln factor + 1)^2`.
        factor, trained: of the stretch.

    Source: Su et al. (2021), arXiv 2104.09864; Chen et al. (2023), arXiv 2306.15595; Peng et al. (2023), arXiv 2309.00071.
    """

    def __init__(
        self,
        width: int,
        base: float = 10_000.0,
        stretch: Stretch = "none",
        factor: float = 1.0,
        trained: int = 2048,
    ) -> None:
        super().__init__()
        require_positive(base=base)
        require_at_least(1, factor=factor, trained=trained)
        require_one_of(get_args(Stretch), stretch=stretch)
        if width < 2 or width % 2:
            raise InputError(f"width: expected an even number of channels to turn in pairs, got {width}")
        self.base, self.stretch, self.factor, self.trained = base, stretch, factor, trained
        turns = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        self.sharpened = 1.0
        if stretch == "interpolated":
            turns = turns / factor
        elif stretch == "yarn":
            around = trained * turns / (2 * math.pi)
            kept = ((around - 1) / (32 - 1)).clamp(0, 1)
            turns = turns * kept + turns / factor * (1 - kept)
            self.sharpened = (0.1 * math.log(factor) + 1) ** 2
        self.register_buffer("turns", turns, persistent=False)
        self.turns: Tensor

    def forward(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch heads keys width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: Positions | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        of_queries, of_keys = positions_of(q, k, positions)
        products = self.turned(q, of_queries) @ self.turned(k, of_keys).mT
        return masked(products * (self.sharpened / math.sqrt(q.shape[-1])), mask)

    def turned(
        self, x: Float[Tensor, "batch heads tokens width"], positions: Int[Tensor, "#batch tokens"]
    ) -> Float[Tensor, "batch heads tokens width"]:
        """Channel i with channel i + width / 2, turned by their angle at each position."""
        # the angle of a far position has no digit left in half precision
        angle = positions[:, None, :, None].to(self.turns.dtype) * self.turns
        first, second = x.chunk(2, -1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
