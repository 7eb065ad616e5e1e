"""Scores, the policy, and both reductions, in the order in which the paper's block has its tokens: plain arithmetic.

Source: Wu et al. 2023, arXiv 2310.01812.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.clusters import bipartite_matching, numbered
from cenote.core.errors import InputError
from cenote.core.reduced import Reduced, merged
from cenote.core.requirements import require_at_least

CLS_SCORE = 2.0
"""Above every score, since these sum to 1."""


def importance(
    attention: Float[Tensor, "batch heads tokens"],
    values: Float[Tensor, "batch kv_heads tokens width"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """How much each token matters: `s_i ~ sum_h A_hi |v_i|`, brought to a sum of 1.

    Args:
        attention: what [CLS] gives each token.
        values: `v`, of all heads together; None for the attention alone.
        mask: the tokens that are scored, None for all; [CLS] is none of them.

    Source:
        Wu et al. 2023, arXiv 2310.01812; Fayyaz et al. 2022, arXiv 2111.15667.
    """
    scores = attention.sum(1)
    if values is not None:
        scores = scores * values.transpose(1, 2).flatten(2).norm(dim=-1)
    if mask is not None:
        scores = scores.masked_fill(~mask, 0.0)
    return scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def score_variance(
    scores: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None, *, normalised: bool = False
) -> Float[Tensor, "batch"]:
    """The unbiased variance of each image's scores; 0 of fewer than two tokens.

    Args:
        scores: that sum to 1.
        mask: the tokens that count, None for all.
        normalised: times the square of how many tokens there are, so that it does not shrink with them: the squared coefficient
            of variation.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    tokens = mask.sum(1)
    mean = torch.where(mask, scores, 0.0).sum(1) / tokens.clamp(min=1)
    squares = torch.where(mask, scores - mean[:, None], 0.0).square().sum(1)
    variance = squares / (tokens - 1).clamp(min=1)
    return variance * tokens.square() if normalised else variance


def pooled_tokens(
    x: Float[Tensor, "batch tokens dim"],
    metric: Float[Tensor, "batch tokens width"],
    r: int,
    sizes: Float[Tensor, "batch tokens"] | None = None,
    *,
    distilled: bool = False,
) -> Reduced:
    """The `r` tokens with the most similar partner merged into it: every second token, from [CLS] on, may go, into the others.

    Args:
        x: [CLS] first.
        metric: by whose cosine tokens are alike: the keys' mean over heads.
        r: how many are merged away, at most `(tokens - 1) // 2`.
        sizes: how many originals each stands for, None for 1.
        distilled: whether the second token is that of distillation, into which nothing is merged.

    Returns:
        The tokens that may go and have not, [CLS] first; then the others.
    """
    batch, tokens = x.shape[:2]
    r = limited(r, tokens)
    at = torch.arange(tokens, device=x.device).expand(batch, -1)
    left = (at.remainder(2) == 0) & (at > 0)
    right = (at.remainder(2) == 1) & (at > int(distilled))
    onto = bipartite_matching(metric, left, right, torch.full((batch,), r, device=x.device))
    by_place = numbered(onto, at >= 0)
    own = onto.gather(1, onto)
    # the paper's order: first what stands at even places
    ahead = ((own == at) & (at.remainder(2) == 0)).long().cumsum(1) - 1
    behind = ((at.remainder(2) == 1).long().cumsum(1) - 1) + (tokens + 1) // 2 - r
    place = torch.where(at.remainder(2) == 0, ahead, behind).gather(1, own)
    return merged(x, place, int(by_place.max()) + 1 if by_place.numel() else 0, sizes)


def pruned_tokens(
    x: Float[Tensor, "batch tokens dim"],
    scores: Float[Tensor, "batch tokens"],
    r: int,
    sizes: Float[Tensor, "batch tokens"] | None = None,
) -> Reduced:
    """Without the `r` tokens of least score: those that stay in the order of their scores, the largest first.

    Args:
        x: [CLS] first.
        scores: of all, [CLS] above the others.
        r: how many go.
        sizes: how many originals each stands for, None for 1; those of what goes are lost.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(1, order, torch.arange(x.shape[1], device=x.device).expand_as(order))
    left = x.shape[1] - limited(r, x.shape[1])
    return merged(x, rank.masked_fill(rank >= left, -1), left, sizes)


def limited(r: int, tokens: int) -> int:
    """`r`, at most half of what is not [CLS]."""
    require_at_least(0, r=r)
    return min(r, max(tokens - 1, 0) // 2)


def reductions(
    r: int | Sequence[int] | tuple[int, float], blocks: int, tokens: int | None = None, *, prefix: int = 1
) -> list[int]:
    """How many tokens go in each reducing block.

    Args:
        r: the same in all; a list, zeros where it is too short; or `(r, inflection)`, from `r (1 - inflection)` in the first
            linearly to `r (1 + inflection)` in the last.
        blocks: how many reduce.
        tokens: that the first of them reads, [CLS] included, by which numbers are limited; None for no limit.
        prefix: of these, those that stay.

    Example:
        >>> reductions(8, 3), reductions([9], 3), reductions((8, 0.5), 3), reductions(50, 3, 101)
        ([8, 8, 8], [9, 0, 0], [4, 8, 12], [50, 25, 12])

    Source:
        Bolya et al. 2023, arXiv 2210.09461; Wu et al. 2023, arXiv 2310.01812.
    """
    require_at_least(1, blocks=blocks)
    if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
        middle, inflection = int(r[0]), r[1]
        if not -1 <= inflection <= 1:
            raise InputError(f"r: expected an inflection from -1 to 1, got {inflection}")
        # 10 (1 - 0.8) is 1.9999999999999996
        first = int(round(middle * (1 - inflection), 9))
        step = (2 * middle - 2 * first) / max(blocks - 1, 1)
        numbers = [int(round(first + step * n, 9)) for n in range(blocks)]
    elif isinstance(r, int):
        numbers = [r] * blocks
    else:
        given = [int(n) for n in r]
        if len(given) > blocks:
            raise InputError(f"r: {len(given)} numbers for {blocks} blocks")
        numbers = given + [0] * (blocks - len(given))
    require_at_least(0, r=min(numbers))
    if tokens is None:
        return numbers
    found = []
    for number in numbers:
        found.append(min(number, max(tokens - prefix, 0) // 2))
        tokens -= found[-1]
    return found


def in_place(reduced: Reduced, like: Reduced) -> Int[Tensor, "batch left"]:
    """Where each token of `like` stands in another reduction that puts the same tokens together.

    >>> a = Reduced(torch.zeros(1, 2, 1), torch.ones(1, 2), torch.tensor([[0, 1, -1]]))
    >>> b = Reduced(torch.zeros(1, 2, 1), torch.ones(1, 2), torch.tensor([[1, 0, -1]]))
    >>> in_place(a, b).tolist()
    [[1, 0]]
    """
    places = torch.zeros_like(like.sizes, dtype=torch.long)
    left = places.shape[1]
    places = torch.nn.functional.pad(places, (0, 1))
    return places.scatter(1, like.assignment.remainder(left + 1), reduced.assignment)[:, :left]
