"""Labelled token features that stay on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.features.dataset import TokenDataset
from cenote.features.store.tokens import StoredTokens


@dataclass(frozen=True)
class StoredDataset(TokenDataset):
    """A `TokenDataset` whose tokens are read from a feature store, batch by batch.

    Attributes:
        x: the `StoredTokens`.
        layers: which of the stored layers. With one, items are `[tokens, dim]` and batches `[items, tokens, dim]`; with
            several, `[layers, tokens, dim]` and `[items, layers, tokens, dim]`.
        images: of items that are images, `StoredPictures`.
    """

    layers: tuple[int, ...] = field(default=())

    @property
    def stored(self) -> StoredTokens:
        """Where the tokens are."""
        tokens: Any = self.x
        return tokens

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.stored.manifest.dim

    @property
    def dtype(self) -> torch.dtype:
        """Type of the token features."""
        return self.stored.dtype

    @property
    def tokens(self) -> int | None:
        """Tokens per item, prefix included; `None` where items differ."""
        lengths = self.stored.lengths
        return int(lengths[0]) if bool((lengths == lengths[0]).all()) else None

    def lengths(self) -> Int[Tensor, "items"]:
        """Number of tokens of each item."""
        return self.stored.lengths

    def item(self, index: int) -> Tensor:
        """Tokens of one item: of a single layer without a copy."""
        if len(self.layers) == 1:
            return self.stored.item(index, self.layers[0])
        return torch.stack([self.stored.item(index, layer) for layer in self.layers])

    def batch(
        self, items: Int[Tensor, "chosen"]
    ) -> tuple[Float[Tensor, "chosen *layers tokens dim"], Bool[Tensor, "chosen tokens"] | None]:
        """`(x, mask)` of some items; the mask is `None` where nothing is padded."""
        x, mask = self.stored.gather(items, self.layers)
        return (x.squeeze(1) if len(self.layers) == 1 else x), mask

    def nbytes(self) -> int:
        """Bytes of the token features of the chosen layers, on disk."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        return int(self.stored.lengths.sum()) * self.dim * len(self.layers) * size

    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the shards, the layers, targets, ids, groups and split."""
        digest = hashlib.sha256(self.stored.digest().encode())
        for tensor in (self.y, self.split):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        text = (*self.ids, *self.classes, *(self.groups or ()), self.task, str(self.prefix_tokens), str(self.layers))
        digest.update("\n".join(text).encode())
        return digest.hexdigest()

    def at(self, layer: int) -> StoredDataset:
        """The same items at one of the layers; negative numbers count from the model's last one.

        Raises:
            InputError: where the store does not hold it.
        """
        held = self.stored.manifest.layers
        number = held[layer] if layer < 0 and -layer <= len(held) else layer
        if number not in held:
            raise InputError(f"layers: the store holds {', '.join(map(str, held))}; there is no layer {layer}")
        return replace(self, layers=(number,))

    def in_memory(self) -> TokenDataset:
        """A copy that holds all tokens of its one layer in memory.

        Raises:
            InputError: where it has several layers.
        """
        from cenote.core import Bags

        if len(self.layers) != 1:
            raise InputError(f"layers: {self.layers}; choose one with at(layer)")
        rows = [self.item(i) for i in range(len(self))]
        x = torch.stack(rows) if self.tokens is not None else Bags.from_list(rows)
        kept = {f.name: getattr(self, f.name) for f in fields(TokenDataset)}
        return TokenDataset(**{**kept, "x": x})
