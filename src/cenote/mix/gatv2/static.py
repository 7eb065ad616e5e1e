"""Whether attention is static: whether all queries rank the keys in the same order.

Source: Brody, Alon, Yahav, "How Attentive are Graph Attention Networks?", ICLR 2022, definitions 3.1 and 3.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError


def static_key(
    scores: Float[Tensor, "*heads queries keys"], mask: Bool[Tensor, "*#heads queries keys"] | None = None
) -> Bool[Tensor, "*heads"]:
    """Whether one key has the largest score of every query.

    Args:
        scores: or weights, of any attention.
        mask: True = this query may read this key, None for all; a query that reads none does not count.

    Example:
        >>> static_key(torch.tensor([[1.0, 2.0], [5.0, 6.0]])), static_key(torch.eye(2))
        (tensor(True), tensor(False))

    Source:
        Brody et al. 2022, definition 3.1.
    """
    scores, seen = _checked(scores, mask)
    at_top = (scores >= scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)) & seen
    return (at_top | ~seen.any(-1, keepdim=True)).all(-2).any(-1)


def rank_agreement(
    scores: Float[Tensor, "*heads queries keys"], mask: Bool[Tensor, "*#heads queries keys"] | None = None
) -> Float[Tensor, "*heads"]:
    """Kendall's tau between the orders in which two queries rank the keys, the mean over pairs of queries.

    Pairs of keys that one of the two queries ties, or does not see, do not count.

    Args:
        scores: or weights, of any attention.
        mask: True = this query may read this key, None for all.

    Returns:
        1 where all queries agree, as those of GAT always do, -1 where two are opposed; 1 where nothing can be compared.

    Example:
        >>> rank_agreement(torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 9.0]]))
        tensor(1.)

    Source:
        The diagnostic follows Brody et al. 2022; tau as its measure is ours.
    """
    scores, seen = _checked(scores, mask)
    first, second = torch.triu_indices(scores.shape[-1], scores.shape[-1], 1, device=scores.device)
    order = (scores[..., first] - scores[..., second]).sign()
    order = order * (seen[..., first] & seen[..., second])
    agree, both = order @ order.mT, order.abs() @ order.abs().mT
    apart = torch.ones_like(agree, dtype=torch.bool).triu(1) & (both > 0)
    tau = (agree / both.clamp(min=1)).masked_fill(~apart, 0.0)
    pairs = apart.sum((-1, -2))
    return torch.where(pairs > 0, tau.sum((-1, -2)) / pairs.clamp(min=1), torch.ones_like(tau[..., 0, 0]))


def _checked(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if scores.dim() < 2 or not scores.shape[-1]:
        raise InputError(f"scores: expected [..., queries, keys] with at least one key, got {list(scores.shape)}")
    seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    # scores that are -inf are a mask too, and no order
    seen = seen & scores.isfinite()
    return scores.masked_fill(~seen, 0.0), seen
