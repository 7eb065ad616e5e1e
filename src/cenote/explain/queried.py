"""Attention of every layer, which token of the top one is explained, and which tokens are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import AttentionCall, Place

Query = Literal["first", "last"]


def calls_of_layers(found: Mapping[Place, Sequence[AttentionCall]]) -> list[AttentionCall]:
    """Recorded calls from the lowest layer up; of one block that runs several times (ALBERT) each pass is a layer.

    Raises:
        InputError: where several blocks run more than once, so that places do not tell the order of the layers.
    """
    if len(found) > 1 and (often := [place.path for place, calls in found.items() if len(calls) > 1]):
        raise InputError(
            f"model: {often[0]} runs more than once in one forward, between other blocks, so that the order of the layers is "
            f"not known; expected each block once, or one block alone"
        )
    return [call for calls in found.values() for call in calls]


def real_tokens(inputs: Mapping[str, Any], call: AttentionCall) -> Bool[Tensor, "batch tokens"]:
    """The mask of a model's inputs, as attention reads; without one every token is real.

    Raises:
        InputError: for a mask of another shape, or an item without a token.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(call.batch, call.keys, dtype=torch.bool, device=call.q.device)
    if mask.shape != (call.batch, call.keys):
        raise InputError(
            f"attention_mask: expected [{call.batch}, {call.keys}], as attention reads, got {list(mask.shape)}"
        )
    real = mask.to(call.q.device) != 0
    if not bool(real.any(1).all()):
        raise InputError("attention_mask: an item has no token")
    return real


def one_hot(mask: Bool[Tensor, "batch tokens"], query: Query) -> Float[Tensor, "batch tokens"]:
    """One at the first or the last real token of each item."""
    numbers = torch.arange(mask.shape[1], device=mask.device)
    first = query == "first"
    at = numbers.masked_fill(~mask, mask.shape[1]).amin(1) if first else numbers.masked_fill(~mask, -1).amax(1)
    return nn.functional.one_hot(at, mask.shape[1]).float()
