"""What scores blocks of keys without having learned to: rivals of gates, and their upper bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import routing
from cenote.core.requirements import require_one_of
from cenote.mix.blocks import pooled, pooled_target, repeated, row_maxima
from cenote.models.live import AttentionCall

BlockScorer = Callable[[AttentionCall, int, Tensor], Tensor]
"""From a call, real tokens of a prompt on the left, the tokens of a block and which keys are real: scores
`[batch, heads, rows, blocks]`, rows blocks of queries of a prompt, or the one query of a step."""
Rival = Literal["mean", "quest", "oracle", "window", "random"]


def block_rival(rule: Rival, seed: int = 0) -> BlockScorer:
    """A way to score blocks.

    Args:
        rule: `"mean"`: products of mean queries and mean keys, as in MoBA; `"quest"`: the largest product that a key of the
            block can have, by its channels' least and largest numbers; `"oracle"`: the largest true weight, which reads all
            keys; `"window"`: the first block, then the nearest ones; `"random"`: a lot.
        seed: of `"random"`.

    Raises:
        InputError: for another rule.

    Source: Quest: Tang et al. (2024), arXiv 2406.10774.
    """
    require_one_of(get_args(Rival), rule=rule)
    drawn = torch.Generator().manual_seed(seed)

    def score(call: AttentionCall, block: int, real: Tensor) -> Float[Tensor, "batch heads rows blocks"]:
        if rule == "oracle":
            if call.queries > 1:
                return pooled_target(call.q, call.k, block, real, call.scale)
            tops, log = row_maxima(call.q, call.k, block, real, call.scale)
            return (tops - log[..., None]).exp()
        means = pooled(call.k, block, ("avg",), real)
        rows = call.q if call.queries == 1 else pooled(call.q, block, ("avg",), real)
        shape = (*rows.shape[:3], means.shape[2])
        if rule == "random":
            return torch.rand(shape, generator=drawn).to(means)
        if rule == "window":
            at = torch.arange(shape[3], device=means.device, dtype=means.dtype)
            return at.masked_fill(at == 0, float(shape[3])).expand(shape)
        if rule == "quest":
            low, high = pooled(call.k, block, ("min",), real), pooled(call.k, block, ("max",), real)
            return routing.bounded(rows, low, high)
        return rows @ repeated(means, call.heads).mT

    return score
