"""Labelled features of several layers of a model, and the views of them that pools take."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.features.dataset import TokenDataset
from cenote.features.store import StoredDataset


@dataclass(frozen=True)
class LayeredDataset(TokenDataset):
    """A `TokenDataset` that holds several layers in memory.

    Attributes:
        x: `[items, layers, tokens, dim]`, or `Bags` of width `layers * dim`, the layers of a token side by side, where items
            have different numbers of tokens.
        layers: numbers of the layers, rising; 0 stands for the embeddings.

    Example:
        >>> from cenote.features import digits
        >>> d = digits()
        >>> stack = torch.stack([d.x, d.x + 1], 1)
        >>> both = LayeredDataset("two", stack, d.y, d.task, d.classes, d.ids, d.split, layers=(5, 6))
        >>> both.batch(torch.tensor([0, 3]))[0].shape, both.at(6).x.shape
        (torch.Size([2, 2, 17, 64]), torch.Size([1797, 17, 64]))
    """

    layers: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        count = self.x.dim if isinstance(self.x, Bags) else self.x.shape[1] if self.x.dim() == 4 else 0
        fits = count == len(self.layers) if not isinstance(self.x, Bags) else count % max(len(self.layers), 1) == 0
        if not self.layers or not fits or sorted(set(self.layers)) != list(self.layers):
            shape = tuple(self.x.values.shape) if isinstance(self.x, Bags) else tuple(self.x.shape)
            raise InputError(
                f"layers: expected rising numbers, one per layer of x [items, layers, tokens, dim] (of Bags: "
                f"[total, layers * dim]), "
                f"got {self.layers} for x of shape {shape}"
            )

    @property
    def dim(self) -> int:
        """Width of a token in one layer."""
        return self.x.dim // len(self.layers) if isinstance(self.x, Bags) else self.x.shape[-1]

    @property
    def tokens(self) -> int | None:
        """Tokens per item, prefix included; `None` where items differ."""
        return None if isinstance(self.x, Bags) else self.x.shape[2]

    def lengths(self) -> Int[Tensor, "items"]:
        """Number of tokens of each item."""
        if isinstance(self.x, Bags):
            return self.x.lengths()
        return torch.full((len(self),), self.x.shape[2])

    def item(self, index: int) -> Float[Tensor, "layers tokens dim"]:
        """All layers of one item, without a copy."""
        if isinstance(self.x, Bags):
            return self.x[index].unflatten(-1, (len(self.layers), self.dim)).transpose(0, 1)
        return self.x[index]

    def batch(
        self, items: Int[Tensor, "chosen"]
    ) -> tuple[Float[Tensor, "chosen layers tokens dim"], Bool[Tensor, "chosen tokens"] | None]:
        """`(x, mask)` of some items; the mask is `None` where nothing is padded."""
        if not isinstance(self.x, Bags):
            return self.x[items], None
        x, mask = self.x.select(items).to_padded()
        stack = x.unflatten(-1, (len(self.layers), self.dim)).transpose(1, 2)
        return stack, None if bool(mask.all()) else mask

    def fingerprint(self) -> str:
        """SHA-256 over everything that `TokenDataset` counts, and the layers."""
        return hashlib.sha256(f"{super().fingerprint()} {self.layers}".encode()).hexdigest()

    def only(self, layers: Sequence[int]) -> LayeredDataset:
        """The same items with some of the layers."""
        if tuple(layers) == self.layers:
            return self
        kept = [self._place(n) for n in layers]
        if isinstance(self.x, Bags):
            values = self.x.values.unflatten(-1, (len(self.layers), self.dim))[:, kept].flatten(1)
            return replace(self, x=Bags(values, self.x.offsets), layers=tuple(layers))
        return replace(self, x=self.x[:, kept], layers=tuple(layers))

    def at(self, layer: int) -> TokenDataset:
        """The same items at one of the layers.

        Raises:
            InputError: where there is no such layer.
        """
        place = self._place(layer)
        if isinstance(self.x, Bags):
            values = self.x.values.unflatten(-1, (len(self.layers), self.dim))[:, place]
            x: Tensor | Bags = Bags(values, self.x.offsets)
        else:
            x = self.x[:, place]
        plain = {f.name: getattr(self, f.name) for f in fields(TokenDataset)}
        return TokenDataset(**{**plain, "x": x})

    def _place(self, layer: int) -> int:
        if layer not in self.layers:
            raise InputError(f"layers: there is no layer {layer}; there are {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)


def layers_of(data: TokenDataset) -> tuple[int, ...]:
    """Numbers of the layers that the data hold; empty where they do not say."""
    return data.layers if isinstance(data, LayeredDataset | StoredDataset) else ()


def at_layer(data: TokenDataset, layer: int) -> TokenDataset:
    """The same items at one of the layers that they hold."""
    if not isinstance(data, LayeredDataset | StoredDataset):
        raise InputError(f"layers: these data hold one layer, and not by number; there is no layer {layer}")
    return data.at(layer)


def with_layers(data: TokenDataset, layers: Sequence[int]) -> TokenDataset:
    """The same items as stacks of some of the layers that they hold."""
    if isinstance(data, LayeredDataset):
        return data.only(layers)
    if isinstance(data, StoredDataset):
        return replace(data, layers=tuple(layers))
    raise InputError("layers: these data hold one layer; give features of several")
