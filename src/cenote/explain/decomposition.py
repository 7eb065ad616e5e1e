"""Parts that sum to a value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError, files

FORMAT = 1


class Part(NamedTuple):
    """One of the parts of a value."""

    name: str
    value: float


@dataclass(frozen=True, eq=False)
class Parts:
    """Values, and parts that sum to them; what is missing is said.

    Attributes:
        values: of each part, `[batch, parts, targets]`.
        names: of the parts.
        total: what they should sum to, as it was found without them, `[batch, targets]`.

    Example:
        >>> parts = Parts(torch.tensor([[[1.0], [-3.0]]]), ("a", "b"), torch.tensor([[-2.0]]))
        >>> parts.residual.tolist(), parts.top(1)
        ([[0.0]], [Part(name='b', value=-3.0)])
    """

    values: Float[Tensor, "batch parts targets"]
    names: Sequence[str]
    total: Float[Tensor, "batch targets"]

    def __post_init__(self) -> None:
        batch, parts, targets = self.values.shape
        if len(self.names) != parts:
            raise InputError(f"names: {len(self.names)} of them, and {parts} parts")
        if self.total.shape != (batch, targets):
            raise InputError(f"total: expected [{batch}, {targets}] as the values, got {list(self.total.shape)}")

    @property
    def residual(self) -> Float[Tensor, "batch targets"]:
        """What the parts leave of the total."""
        return self.total - self.values.sum(1)

    @property
    def relative_residual(self) -> float:
        """The largest residual, relative to the largest total."""
        return float(self.residual.abs().max() / self.total.abs().max().clamp(min=1e-12))

    def top(self, k: int, item: int = 0, target: int = 0) -> list[Part]:
        """The largest parts of one value, by magnitude."""
        if k < 1:
            raise InputError(f"k: expected at least 1, got {k}")
        found = self.values[item, :, target]
        return [Part(self.names[i], float(found[i])) for i in found.abs().argsort(descending=True)[:k].tolist()]

    def only(self, start: str) -> Float[Tensor, "batch targets"]:
        """The sum of the parts whose names start so."""
        chosen = [i for i, name in enumerate(self.names) if name.startswith(start)]
        if not chosen:
            raise InputError(f"start: no part's name starts with {start!r}; they are {', '.join(self.names[:8])}, ...")
        return self.values[:, chosen].sum(1)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        card = {"format": FORMAT, "names": list(self.names)}
        files.write_tensors(Path(path), {"values": self.values, "total": self.total}, {"parts": json.dumps(card)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: naming the file, where it is none of these.
        """
        try:
            stored = files.read_tensors(Path(path))
            card = json.loads(stored.metadata["parts"])
            found = cls(stored.tensors["values"], tuple(card["names"]), stored.tensors["total"])
        except FileNotFoundError:
            raise InputError(f"{path}: is not there") from None
        except Exception as error:
            raise InputError(f"{path}: holds no parts ({error})") from None
        files.require_format(Path(path), card, FORMAT)
        return found
