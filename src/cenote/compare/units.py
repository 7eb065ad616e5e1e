"""What arms are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from cenote.core.errors import InputError


@dataclass(frozen=True)
class Units:
    """The test items, queries, inputs or texts that every arm is measured on, in one order.

    Attributes:
        names: one for each unit.
        groups: which units belong together (crops of one image, questions of one document); statistics draw whole groups.

    Raises:
        InputError: where there is no unit, or not one group for each.

    Example:
        >>> Units(("q1", "q2", "q3"), ("b", "a", "b")).group_numbers().tolist()
        [1, 0, 1]
    """

    names: Sequence[str]
    groups: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not len(self.names):
            raise InputError("units: expected at least one, got none")
        if self.groups is not None and len(self.groups) != len(self.names):
            raise InputError(f"groups: expected one for each of {len(self.names)} units, got {len(self.groups)}")

    def __len__(self) -> int:
        return len(self.names)

    def group_numbers(self) -> Int[ndarray, "units"]:
        """The group of each unit, numbered from 0; each unit is its own where there are none."""
        if self.groups is None:
            return np.arange(len(self))
        return np.unique(list(self.groups), return_inverse=True)[1]
