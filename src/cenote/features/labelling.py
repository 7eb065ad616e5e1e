"""Where labels, groups and splits come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from cenote.core import InputError

FRACTIONS = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Labelling:
    """How items are labelled, grouped and split: the arguments of `cenote.features.read` that say so, as one.

    Attributes:
        task: `"binary"`, `"multiclass"`, `"multilabel"` or `"regression"`; default by the rules of `cenote.features.targets`.
        label: the column with the label, or several columns; default by name, see `cenote.features.read`.
        group: column with the patient, speaker, ...; default `group`, if there.
        split: column with train, val or test; default `split`, if there.
        fractions: shares of train, val, test where no split is given.
        seed: of the split that is made.

    Raises:
        InputError: where the fractions are no three positive shares that sum to 1, or the seed is none.
    """

    task: str | None = None
    label: str | Sequence[str] | None = None
    group: str | None = None
    split: str | None = None
    fractions: Sequence[float] = FRACTIONS
    seed: int = 0

    def __post_init__(self) -> None:
        shares = tuple(self.fractions) if isinstance(self.fractions, Iterable) else ()
        numbers = [s for s in shares if isinstance(s, Real) and s > 0]
        if len(shares) != 3 or len(numbers) != 3 or abs(float(sum(numbers)) - 1) > 1e-6:
            raise InputError(
                f"fractions: expected three positive shares that sum to 1, train, val, test; got "
                f"{shares or self.fractions}"
            )
        if not isinstance(self.seed, Integral) or not 0 <= int(self.seed) < 2**32:
            raise InputError(f"split_seed: expected a whole number from 0 to {2**32 - 1}, got {self.seed}")
