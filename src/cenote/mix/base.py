"""What mixes tokens, and what stands in the parts of attention: scores, what makes weights of them, gates of heads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_floating


class Mixer(nn.Module, ABC):
    """Base of what changes each token by the others: as many tokens come out, as wide as they went in.

    A mixer defines `mix(x, mask, positions)`; that what stands in padding, NaN included, reaches nothing and that padding comes
    out as zeros is done here once. It stands in a model by `cenote.models.live.swapped(model, {place: as_mixer(mixer)})`.

    Attributes:
        dim: width of the tokens, checked in use; 0 where any will do.
        causal: no token is changed by a later one.
        order_matters: whether tokens in another order come out otherwise than in that order.
    """

    method_kind: ClassVar[str] = "mixer"

    dim: int = 0
    causal: bool = False
    order_matters: bool = True

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens, mixed.

        Args:
            x: the tokens.
            mask: True = a real token, None for all.
            positions: where each token stands, None to count the real ones from 0.

        Returns:
            Zeros where the mask is False.

        Raises:
            InputError: for shapes or types that do not fit.
        """
        mask, positions = self._checked(x, mask, positions)
        if not x.numel():
            return x
        real = mask.unsqueeze(-1)
        return self.mix(x.masked_fill(~real, 0.0), mask, positions).masked_fill(~real, 0.0)

    @abstractmethod
    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens, mixed; whatever stands in padding's place.

        Args:
            x: zeros where the mask is False.
            mask: a set may have no token.
            positions: counts the real tokens from 0 unless told otherwise.
        """

    def weights_of(
        self,
        x: Float[Tensor, "batch tokens dim"],  # noqa: ARG002
        mask: Bool[Tensor, "batch tokens"] | None = None,  # noqa: ARG002
        positions: Int[Tensor, "batch tokens"] | None = None,  # noqa: ARG002
    ) -> Float[Tensor, "batch heads tokens tokens"] | None:
        """What each token takes of each, rows that sum to 1 over the real ones; None where the mixer has no such weights."""
        return None

    def _checked(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.dim() != 3:
            raise InputError(f"x: expected [batch, tokens, dim], got {list(x.shape)}")
        if self.dim and x.shape[2] != self.dim:
            raise InputError(f"x: expected tokens of width {self.dim}, got {x.shape[2]}")
        require_floating(x)
        for name, value in (("mask", mask), ("positions", positions)):
            if value is not None and value.shape != x.shape[:2]:
                raise InputError(f"{name}: expected {list(x.shape[:2])} as the tokens, got {list(value.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise InputError(f"mask: expected bool, got {mask.dtype}")
        if positions is not None and (positions.is_floating_point() or positions.dtype == torch.bool):
            raise InputError(f"positions: expected whole numbers, got {positions.dtype}")
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        return mask, mask.long().cumsum(1).sub(1).clamp(min=0) if positions is None else positions


class GridMixer(Mixer):
    """Base of the mixers of images: tokens are the cells of a grid, row by row.

    Args:
        grid: rows and columns; None for a square.
        prefix: so many tokens stand before the grid ([CLS], registers) and come out as they went in.

    Raises:
        InputError: in use, where the tokens are no such grid.
    """

    def __init__(self, *, grid: tuple[int, int] | None = None, prefix: int = 0) -> None:
        super().__init__()
        if grid is not None:
            require_at_least(1, rows=grid[0], columns=grid[1])
        require_at_least(0, prefix=prefix)
        self.grid, self.prefix = grid, prefix

    def mix(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"],
        positions: Int[Tensor, "batch tokens"],  # noqa: ARG002
    ) -> Float[Tensor, "batch tokens dim"]:
        rows, columns = self.grid_of(x.shape[1])
        cells = x[:, self.prefix :].transpose(1, 2).unflatten(-1, (rows, columns))
        mixed = self.mix_grid(cells, mask[:, self.prefix :].unflatten(-1, (rows, columns)))
        return torch.cat([x[:, : self.prefix], mixed.flatten(2).transpose(1, 2)], 1)

    @abstractmethod
    def mix_grid(
        self, x: Float[Tensor, "batch dim rows columns"], real: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The cells, mixed.

        Args:
            x: zeros where `real` is False.
            real: False where an image has no cell.
        """

    def grid_of(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of so many tokens.

        Raises:
            InputError: where they are no such grid.
        """
        cells = tokens - self.prefix
        rows, columns = self.grid or (math.isqrt(max(cells, 0)),) * 2
        if cells < 1 or rows * columns != cells:
            said = f"{rows} x {columns}" if self.grid else "a square"
            before = f" behind {self.prefix} before it" if self.prefix else ""
            raise InputError(f"x: expected a grid of tokens, {said}{before}, got {tokens} tokens; give grid and prefix")
        return rows, columns


class ScoreModifier(nn.Module, ABC):
    """Base of what gives attention its scores.

    Attributes:
        reads_queries, reads_keys: whether scores depend on what queries and keys are.
        level_parameters: names of parameters that add the same number to all scores of a row.
    """

    reads_queries: bool = True
    reads_keys: bool = True
    level_parameters: tuple[str, ...] = ()

    @abstractmethod
    def forward(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch heads keys width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch keys"]] | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Scores before what makes weights of them.

        Args:
            q, k: queries and keys.
            mask: True = this query may read this key, None for all.
            positions: of the queries and of the keys; None for keys from 0 and queries that are the last of them.

        Returns:
            -inf where the mask is False.
        """


class Normaliser(nn.Module, ABC):
    """Base of what makes weights of scores.

    Attributes:
        forgets_level: whether weights stay as they are where one number is added to all scores of a row.
    """

    forgets_level: bool = False

    @abstractmethod
    def forward(
        self, scores: Float[Tensor, "*rows keys"], mask: Bool[Tensor, "*#rows keys"] | None = None
    ) -> Float[Tensor, "*rows keys"]:
        """Weights; 0 where the mask is False or a score is -inf, and rows that may read nothing are 0."""


class HeadGate(nn.Module, ABC):
    """Base of what says how much each head counts."""

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch heads"] | Float[Tensor, "batch tokens heads"]:
        """A factor for each head of an item, or of each token."""
