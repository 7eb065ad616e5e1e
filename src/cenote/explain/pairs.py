"""What an explanation of the similarity of two items gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.explain.base import Attribution

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class PairMap:
    """A signed score for each unit of both items of each pair; those of either item sum to the pair's cosine.

    Attributes:
        a, b: of the units of the first items and of the second; zeros where a unit is padding.
        mask_a, mask_b: True = a real unit.
        cosine: of the pairs.
        units: what is scored, see `Attribution`.
        grid_a, grid_b: rows and columns, where units lie on a grid.
    """

    a: Float[Tensor, "pairs units_a"]
    b: Float[Tensor, "pairs units_b"]
    mask_a: Bool[Tensor, "pairs units_a"]
    mask_b: Bool[Tensor, "pairs units_b"]
    cosine: Float[Tensor, "pairs"]
    units: str = "tokens"
    grid_a: Grid | None = None
    grid_b: Grid | None = None

    def __post_init__(self) -> None:
        for name, scores, grid in (("grid_a", self.a, self.grid_a), ("grid_b", self.b, self.grid_b)):
            if grid is not None and grid[0] * grid[1] != scores.shape[1]:
                raise InputError(f"{name}: {grid[0]} x {grid[1]} are not the {scores.shape[1]} units")

    @property
    def completeness_error(self) -> Float[Tensor, "pairs"]:
        """By how much the scores of either item fail to sum to the cosine, the larger of both."""
        return torch.maximum((self.a.sum(1) - self.cosine).abs(), (self.b.sum(1) - self.cosine).abs())

    def attributions(self) -> tuple[Attribution, Attribution]:
        """The same as one explanation of the first items and one of the second."""
        a = Attribution(
            self.a, self.mask_a, self.units, signed=True, completeness_error=(self.a.sum(1) - self.cosine).abs()
        )
        b = Attribution(
            self.b, self.mask_b, self.units, signed=True, completeness_error=(self.b.sum(1) - self.cosine).abs()
        )
        return a, b

    def on_grids(self) -> tuple[Float[Tensor, "pairs ha wa"], Float[Tensor, "pairs hb wb"]]:
        """Both maps, `[pairs, height, width]`.

        Raises:
            InputError: where units lie on no grid.
        """
        if self.grid_a is None or self.grid_b is None:
            raise InputError("grid: these units lie on no grid; give (height, width) where features are made")
        return self.a.unflatten(1, self.grid_a), self.b.unflatten(1, self.grid_b)
