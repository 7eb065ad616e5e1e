"""How dense attention is: the entropy of its rows, of weights or of a running model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.masks import padding_of
from cenote.models.live import Where, recorded


class Density(NamedTuple):
    """Of attention, by item and head.

    Attributes:
        nats: the mean entropy of a row.
        share: of the entropy of a uniform row, `ln N` with `N` the tokens that may be read; 0 where there is but one.
    """

    nats: Float[Tensor, "batch heads"]
    share: Float[Tensor, "batch heads"]


def attention_density(
    weights: Float[Tensor, "batch heads queries keys"], mask: Bool[Tensor, "batch keys"] | None = None
) -> Density:
    """The mean entropy of the rows of attention.

    Args:
        weights: rows sum to 1.
        mask: True = a real token, None for all; rows of others do not count, where queries are the keys.

    Example:
        >>> found = attention_density(torch.full((1, 1, 3, 3), 1 / 3))
        >>> round(float(found.nats), 4), round(float(found.share), 4)
        (1.0986, 1.0)
    """
    if weights.dim() != 4:
        raise InputError(f"weights: expected [batch, heads, queries, keys], got {list(weights.shape)}")
    entropy = torch.special.entr(weights).sum(-1)
    if mask is None:
        nats = entropy.mean(-1)
        count = torch.full_like(nats[:, :1], weights.shape[-1])
    else:
        if mask.shape != (len(weights), weights.shape[-1]):
            raise InputError(f"mask: expected {[len(weights), weights.shape[-1]]}, got {list(mask.shape)}")
        rows = mask if mask.shape[1] == weights.shape[2] else torch.ones_like(entropy[:, 0], dtype=torch.bool)
        nats = (entropy * rows.unsqueeze(1)).sum(-1) / rows.sum(1, keepdim=True).clamp(min=1)
        count = mask.sum(1, keepdim=True).to(nats.dtype)
    most = count.clamp(min=1).log()
    return Density(nats, torch.where(most > 0, nats / most.clamp(min=math.ulp(1.0)), torch.zeros_like(nats)))


@torch.no_grad()
def density_of(
    model: nn.Module,
    inputs: Mapping[str, Any],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    at: Where | None = None,
) -> list[Density]:
    """The density of each layer of a running model, which is left as it is.

    Args:
        model: any whose attention can be reached.
        inputs: of its forward.
        mask: True = a real token; by default the inputs' `attention_mask`, of attention to as many keys.
        at: which places; default: all.
    """
    with recorded(model, "rows", rows="all", at=at) as found:
        model(**inputs)
    told = padding_of(inputs) if mask is None else None

    def of(weights: Tensor) -> Density:
        fits = told is not None and told.shape == (len(weights), weights.shape[-1])
        return attention_density(weights, told if fits else mask)

    return [of(steps[0]) for steps in found["rows"].values()]
