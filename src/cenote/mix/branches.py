"""Places inside of the branches of a running model where a mixer can stand: before, inside of, and behind attention and MLP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.models.live import feed_forwards, layers, recorded


class Branches(NamedTuple):
    """Of a block: paths of modules.

    Attributes:
        norm: what stands before attention and reads the block's states; empty where there is none.
        projection: the map behind attention's heads.
        up: the maps to the neurons.
        down: the map back.
        dim, neurons: widths.
    """

    norm: str
    projection: str
    up: tuple[str, ...]
    down: str
    dim: int
    neurons: int


@torch.no_grad()
def branches_of(
    model: nn.Module, inputs: Mapping[str, Any], blocks: Collection[int] | None = None
) -> dict[int, Branches]:
    """Where the branches of a model's blocks begin and end, found by running it once.

    Args:
        model: in eval mode; one list of blocks with self-attention.
        inputs: of its forward.
        blocks: numbers; None for all.

    Raises:
        InputError: where the maps of a block cannot be told, or a block is not there.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    ran = layers(model, inputs)
    known = {
        place.block: found for place, found in feed_forwards(model).items() if place.stack == ran[0].call.place.stack
    }
    found = {}
    for layer in ran:
        number = layer.call.place.block
        if number not in known:
            raise InputError(f"model: the feed-forward part of block {number} cannot be told")
        norm = paths[id(layer.norms[0].module)] if layer.order == "pre" else ""
        feed = known[number]
        found[number] = Branches(norm, paths[id(layer.projection)], feed.up, feed.down, feed.dim, feed.neurons)
    wanted = found.keys() if blocks is None else blocks
    if missing := sorted(set(wanted) - found.keys()):
        raise InputError(f"blocks: there is no block {missing[0]}; there are {len(found)}")
    return {number: found[number] for number in wanted}


@torch.no_grad()
def is_causal(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether no token of these inputs is attended to by an earlier one, in any block; told by the weights themselves."""
    with recorded(model, "rows", rows="all") as found:
        model(**inputs)
    maps = [weights for steps in found["rows"].values() for weights in steps]
    if all(weights.shape[-1] < 2 for weights in maps):
        raise InputError("inputs: one token tells nothing about order; give two or more")
    return not any(bool(weights.triu(1).any()) for weights in maps)


class Behind(nn.Module):
    """A mixer behind a module, told what is real.

    Args:
        module: what runs first.
        mixer: what is given its output.
        mask: True = a real token, None for all.
    """

    def __init__(self, module: nn.Module, mixer: nn.Module, mask: Tensor | None = None) -> None:
        super().__init__()
        self.module, self.mixer, self.mask = module, mixer, mask

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _told(self.mixer, self.module(x, *args, **kwargs), self.mask)


class Before(nn.Module):
    """A mixer before a module, told what is real.

    Args:
        mixer: what is given the input.
        module: what runs on what it gives.
        mask: True = a real token, None for all.
    """

    def __init__(self, mixer: nn.Module, module: nn.Module, mask: Tensor | None = None) -> None:
        super().__init__()
        self.module, self.mixer, self.mask = module, mixer, mask

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(_told(self.mixer, x, self.mask), *args, **kwargs)


def _told(mixer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.shape != x.shape[:2]:
        raise InputError(f"mask: expected {list(x.shape[:2])} as the tokens, got {list(mask.shape)}")
    mixed = mixer(x, mask)
    # what the model has at padding is its own
    return mixed if mask is None else torch.where(mask.unsqueeze(-1), mixed, x)
