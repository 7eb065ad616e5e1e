"""Which token of the top layer is explained, and which tokens are real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import AttentionCall

Query = Literal["first", "last"]


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
