"""What is left of a context: keys and values of every block, ready for any number of prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core import InputError, files
from cenote.models.caches import KeysValues

FIELDS = ("mask", "positions", "ends", "lengths")


@dataclass(frozen=True, eq=False)
class Compressed:
    """Keys and values that prompts read in place of their contexts.

    Attributes:
        blocks: of each block keys and values `[batch, kv_heads, slots, width]`, after positions; none: no context.
        mask: True = a real slot, `[batch, slots]`; contexts with fewer are filled up on the left.
        positions: of the slots, `[batch, slots]`.
        ends: position at which a prompt goes on, `[batch]`.
        lengths: tokens of the contexts, `[batch]`.
    """

    blocks: tuple[KeysValues, ...]
    mask: Bool[Tensor, "batch slots"]
    positions: Int[Tensor, "batch slots"]
    ends: Int[Tensor, "batch"]
    lengths: Int[Tensor, "batch"]

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def bytes(self) -> int:
        """Of all keys and values, filled-up slots included."""
        return sum(t.numel() * t.element_size() for block in self.blocks for t in block)

    @property
    def ratios(self) -> list[float]:
        """Of each context, tokens per slot."""
        return (self.lengths / self.mask.sum(1).clamp(min=1)).tolist()

    def of(self, items: Int[Tensor, "chosen"]) -> Compressed:
        """Those of some contexts, in this order and as often: several prompts of one context, or another's context."""
        blocks = tuple(KeysValues(block.keys[items], block.values[items]) for block in self.blocks)
        return replace(
            self,
            blocks=blocks,
            mask=self.mask[items],
            positions=self.positions[items],
            ends=self.ends[items],
            lengths=self.lengths[items],
        )

    def save(self, path: Path) -> None:
        """Write it whole, as safetensors with its SHA-256."""
        tensors = {name: getattr(self, name) for name in FIELDS}
        for number, block in enumerate(self.blocks):
            tensors |= {f"keys.{number}": block.keys, f"values.{number}": block.values}
        files.write_tensors(Path(path), tensors)

    @classmethod
    def load(cls, path: Path) -> Compressed:
        """Read what `save` wrote.

        Raises:
            InputError: where it is no such file, or was changed.
        """
        try:
            tensors = files.read_tensors(Path(path), old=False).tensors
        except (ValueError, OSError) as error:
            raise InputError(f"path: {path} cannot be read ({error}); compress the context again") from error
        missing = [name for name in FIELDS if name not in tensors]
        if missing:
            raise InputError(f"path: {path} holds no compressed contexts: it has no {', '.join(missing)}")
        count = sum(name.startswith("keys.") for name in tensors)
        blocks = tuple(KeysValues(tensors[f"keys.{n}"], tensors[f"values.{n}"]) for n in range(count))
        return cls(blocks, **{name: tensors[name] for name in FIELDS})


def empty(batch: int, like: Tensor) -> Compressed:
    """No context at all.

    >>> empty(2, torch.zeros(1)).bytes
    0
    """
    none = torch.zeros(batch, 0, dtype=torch.long, device=like.device)
    start = torch.zeros(batch, dtype=torch.long, device=like.device)
    return Compressed((), none.bool(), none, start, start)
