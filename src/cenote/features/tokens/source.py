"""What every place where tokens are can be asked."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import Bags, InputError


class TokenSource(ABC):
    """The tokens of some items, wherever they are, in the form that one kind of pool takes.

    It knows nothing of the items but their tokens. A view of the same tokens, one layer of several for example, is another
    source; nothing is copied for it that need not be.

    Attributes:
        layers: numbers of the layers that an item holds, rising; empty where the tokens do not say.
        pads: whether a batch of ragged items is padded.
    """

    layers: tuple[int, ...] = ()
    pads: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of a token in one layer."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the features."""

    @property
    @abstractmethod
    def tokens(self) -> int | None:
        """Tokens per item, prefix included; `None` where items differ."""

    @abstractmethod
    def lengths(self) -> Int[Tensor, "items"]:
        """Number of tokens of each item."""

    @abstractmethod
    def item(self, index: int) -> Float[Tensor, "*layers tokens dim"]:
        """One item, without a copy where it lies in one piece."""

    @abstractmethod
    def batch(self, items: Int[Tensor, "chosen"]) -> tuple[Any, Bool[Tensor, "chosen tokens"] | None]:
        """`(x, mask)` of some items; the mask is `None` where nothing is padded."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the features."""

    @abstractmethod
    def fingerprint(self, targets: Sequence[Tensor], words: Sequence[str]) -> str:
        """SHA-256 over the tokens and what is known of the items. Stored results are found by it: it must never change."""

    def copies(self, index: int, count: int = 1) -> Any:
        """One item, so many times, in float32: what a probe takes."""
        item = self.item(index).float()
        return item.expand(count, *item.shape).contiguous()

    def edges(self) -> Int[Tensor, "items"] | None:
        """Number of edges of each item; `None` where items are no graphs."""
        return None

    def with_edges(self) -> Features:
        """The same tokens as graph pools read them: batches are `Graphs`.

        Raises:
            InputError: where there are no edges.
        """
        raise InputError("data: there are no edges between the tokens of an item; give graphs")

    def at(self, layer: int) -> Features:
        """One of the layers; negative numbers count from the last one that is held.

        Raises:
            InputError: where there is no such layer.
        """
        raise InputError(f"layers: these data hold one layer, and not by number; there is no layer {layer}")

    def only(self, layers: Sequence[int]) -> Features:
        """Stacks of some of the layers.

        Raises:
            InputError: where one of them is not there.
        """
        raise InputError(f"layers: these data hold one layer, got {tuple(layers)}; give features of several")

    @abstractmethod
    def in_memory(self) -> Features:
        """The same tokens where all of them are in memory.

        Raises:
            InputError: where they are on disk, in several layers.
        """


Features = Tensor | Bags | TokenSource
"""What a data set takes as its tokens: an array of one layer, or any source."""


def place(layer: int, held: tuple[int, ...]) -> int:
    """Where a layer stands among those that are held; negative numbers count from the last.

    Raises:
        InputError: where it is not among them.

    Example:
        >>> place(6, (0, 4, 6)), place(-3, (0, 4, 6))
        (2, 0)
    """
    number = held[layer] if -len(held) <= layer < 0 else layer
    if number not in held:
        raise InputError(f"layers: there is no layer {layer}; there are {', '.join(map(str, held))}")
    return held.index(number)


def sha256_of(parts: Sequence[Tensor | bytes], words: Sequence[str]) -> str:
    """SHA-256 over numbers as they lie in memory, then words, a line each."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update("\n".join(words).encode())
    return digest.hexdigest()
