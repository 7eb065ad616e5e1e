"""Tokens of one layer in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.features.tokens.source import Features, TokenSource, sha256_of


class Padded(TokenSource):
    """Items with equally many tokens: no mask, no copy of a slice.

    Args:
        x: `[items, tokens, dim]`.

    Raises:
        InputError: where `x` has another shape.
    """

    def __init__(self, x: Float[Tensor, "items tokens dim"]) -> None:
        if x.dim() != 3:
            raise InputError(
                f"x: expected [items, tokens, dim], or Bags where items differ in tokens, got shape {tuple(x.shape)}; "
                f"features of several layers are a LayeredDataset"
            )
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    @property
    def dim(self) -> int:
        return self.x.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def tokens(self) -> int:
        return self.x.shape[-2]

    def lengths(self) -> Int[Tensor, "items"]:
        return torch.full((len(self),), self.tokens)

    def item(self, index: int) -> Float[Tensor, "tokens dim"]:
        return self.x[index]

    def batch(self, items: Int[Tensor, "chosen"]) -> tuple[Float[Tensor, "chosen tokens dim"], None]:
        return self.x[items], None

    def nbytes(self) -> int:
        return self.x.nbytes

    def fingerprint(self, targets: Sequence[Tensor], words: Sequence[str]) -> str:
        return sha256_of((self.x, self.lengths(), *targets), words)

    def in_memory(self) -> Features:
        return self.x


class Ragged(TokenSource):
    """Items with different numbers of tokens, one after the other; batches are padded.

    Args:
        bags: of width `dim`.
    """

    def __init__(self, bags: Bags) -> None:
        self.bags = bags

    def __len__(self) -> int:
        return len(self.bags)

    @property
    def dim(self) -> int:
        return self.bags.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.bags.values.dtype

    @property
    def tokens(self) -> None:
        return None

    def lengths(self) -> Int[Tensor, "items"]:
        return self.bags.lengths()

    def item(self, index: int) -> Float[Tensor, "tokens dim"]:
        return self.bags[index]

    def batch(
        self, items: Int[Tensor, "chosen"]
    ) -> tuple[Float[Tensor, "chosen tokens dim"], Bool[Tensor, "chosen tokens"] | None]:
        """A single item is not copied."""
        if len(items) == 1:
            return self.bags[int(items[0])].unsqueeze(0), None
        # the edges of graphs stay behind: what takes padded sets ignores them
        x, mask = Bags.select(self.bags, items).to_padded()
        return x, None if bool(mask.all()) else mask

    def nbytes(self) -> int:
        return self.bags.values.nbytes

    def fingerprint(self, targets: Sequence[Tensor], words: Sequence[str]) -> str:
        return sha256_of((self.bags.values, self.bags.offsets, *targets), words)

    def in_memory(self) -> Features:
        return self.bags
