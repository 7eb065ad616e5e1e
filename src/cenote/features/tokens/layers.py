"""Tokens of several layers in memory: an item is `[layers, tokens, dim]`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.features.tokens.arrays import Padded, Ragged
from cenote.features.tokens.source import Features, place


class PaddedLayers(Padded):
    """Several layers of items with equally many tokens.

    Args:
        x: `[items, layers, tokens, dim]`.
        layers: their numbers, rising; 0 stands for the embeddings.

    Raises:
        InputError: where the numbers do not fit `x`.

    Example:
        >>> source = PaddedLayers(torch.ones(5, 2, 17, 64), (5, 6))
        >>> source.batch(torch.tensor([0, 3]))[0].shape, source.at(6).shape
        (torch.Size([2, 2, 17, 64]), torch.Size([5, 17, 64]))
    """

    def __init__(self, x: Float[Tensor, "items layers tokens dim"], layers: Sequence[int]) -> None:
        self.x = x
        self.layers = tuple(layers)
        _check(self.layers, x.dim() == 4 and x.shape[1] == len(self.layers), x)

    def at(self, layer: int) -> Float[Tensor, "items tokens dim"]:
        return self.x[:, place(layer, self.layers)]

    def only(self, layers: Sequence[int]) -> PaddedLayers:
        return PaddedLayers(self.x[:, [place(n, self.layers) for n in layers]], layers)

    def fingerprint(self, targets: Sequence[Tensor], words: Sequence[str]) -> str:
        return _of_layers(super().fingerprint(targets, words), self.layers)

    def in_memory(self) -> Features:
        return self


class RaggedLayers(Ragged):
    """Several layers of items with different numbers of tokens.

    Args:
        bags: of width `layers * dim`, the layers of a token side by side.
        layers: their numbers, rising; 0 stands for the embeddings.

    Raises:
        InputError: where the numbers do not fit `bags`.
    """

    def __init__(self, bags: Bags, layers: Sequence[int]) -> None:
        self.bags = bags
        self.layers = tuple(layers)
        _check(self.layers, bags.dim % max(len(self.layers), 1) == 0, bags.values)

    @property
    def dim(self) -> int:
        return self.bags.dim // len(self.layers)

    def item(self, index: int) -> Float[Tensor, "layers tokens dim"]:
        return self._apart(self.bags[index]).transpose(0, 1)

    def batch(
        self, items: Int[Tensor, "chosen"]
    ) -> tuple[Float[Tensor, "chosen layers tokens dim"], Bool[Tensor, "chosen tokens"] | None]:
        x, mask = super().batch(items)
        return self._apart(x).transpose(1, 2), mask

    def at(self, layer: int) -> Bags:
        return Bags(self._apart(self.bags.values)[:, place(layer, self.layers)], self.bags.offsets)

    def only(self, layers: Sequence[int]) -> RaggedLayers:
        kept = [place(n, self.layers) for n in layers]
        return RaggedLayers(Bags(self._apart(self.bags.values)[:, kept].flatten(1), self.bags.offsets), layers)

    def fingerprint(self, targets: Sequence[Tensor], words: Sequence[str]) -> str:
        return _of_layers(super().fingerprint(targets, words), self.layers)

    def in_memory(self) -> Features:
        return self

    def _apart(self, tokens: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows layers dim"]:
        return tokens.unflatten(-1, (len(self.layers), self.dim))


def _check(layers: tuple[int, ...], fits: bool, x: Tensor) -> None:
    if not layers or not fits or sorted(set(layers)) != list(layers):
        raise InputError(
            f"layers: expected rising numbers, one per layer of x [items, layers, tokens, dim] (of Bags: "
            f"[total, layers * dim]), got {layers} for x of shape {tuple(x.shape)}"
        )


def _of_layers(fingerprint: str, layers: tuple[int, ...]) -> str:
    return hashlib.sha256(f"{fingerprint} {layers}".encode()).hexdigest()
