"""Layers of a feature store as the tokens of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.features.store.tokens import StoredTokens
from cenote.features.tokens.source import Features, TokenSource, place, sha256_of


class StoredLayers(TokenSource):
    """Tokens that stay on disk, read batch by batch.

    Args:
        stored: where they are.
        layers: which of the stored layers. With one, items are `[tokens, dim]` and batches `[items, tokens, dim]`; with
            several, `[layers, tokens, dim]` and `[items, layers, tokens, dim]`.
    """

    def __init__(self, stored: StoredTokens, layers: Sequence[int]) -> None:
        self.stored = stored
        self.layers = tuple(layers)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def dim(self) -> int:
        return self.stored.manifest.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def tokens(self) -> int | None:
        lengths = self.stored.lengths
        return int(lengths[0]) if bool((lengths == lengths[0]).all()) else None

    def lengths(self) -> Int[Tensor, "items"]:
        return self.stored.lengths

    def item(self, index: int) -> Float[Tensor, "*layers tokens dim"]:
        """Of a single layer, in the mapped memory."""
        if len(self.layers) == 1:
            return self.stored.item(index, self.layers[0])
        return torch.stack([self.stored.item(index, layer) for layer in self.layers])

    def batch(
        self, items: Int[Tensor, "chosen"]
    ) -> tuple[Float[Tensor, "chosen *layers tokens dim"], Bool[Tensor, "chosen tokens"] | None]:
        x, mask = self.stored.gather(items, self.layers)
        return (x.squeeze(1) if len(self.layers) == 1 else x), mask

    def nbytes(self) -> int:
        """Of the chosen layers, on disk."""
        return int(self.stored.lengths.sum()) * self.dim * len(self.layers) * self.dtype.itemsize

    def fingerprint(self, targets: Sequence[Tensor], words: Sequence[str]) -> str:
        """Of the checksums of the shards, not of the tokens, which are not read for it."""
        return sha256_of((self.stored.digest().encode(), *targets), (*words, str(self.layers)))

    def at(self, layer: int) -> StoredLayers:
        """One of the layers of the store, whichever this view holds."""
        return self.only((layer,))

    def only(self, layers: Sequence[int]) -> StoredLayers:
        held = self.stored.manifest.layers
        return StoredLayers(self.stored, [held[place(n, held)] for n in layers])

    def in_memory(self) -> Features:
        """A copy of its one layer."""
        if len(self.layers) != 1:
            raise InputError(f"layers: {self.layers}; choose one with at(layer)")
        rows = [self.item(i) for i in range(len(self))]
        return torch.stack(rows) if self.tokens is not None else Bags.from_list(rows)
