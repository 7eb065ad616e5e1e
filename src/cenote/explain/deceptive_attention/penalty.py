"""Losses on attention weights: how much lies where it should not.

Source: Pruthi et al., "Learning to Deceive with Attention-Based Explanations" (2020), arXiv 1909.07913.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.masks import first_tokens
from cenote.core.requirements import require_one_of

Reduce = Literal["mean", "max", "batch_min"]
LEAST = 1e-6
"""Of the attention that is left, before its logarithm is taken."""


class MassPenalty(NamedTuple):
    """A penalty and what it saw.

    Attributes:
        loss: to add to the task's.
        mass: on impermissible tokens, mean over items and heads.
        largest: on impermissible tokens, of all items and heads.
        padding: on padding, mean over items and heads.
    """

    loss: Float[Tensor, ""]
    mass: Float[Tensor, ""]
    largest: Float[Tensor, ""]
    padding: Float[Tensor, ""]


def attention_mass_penalty(
    attention: Float[Tensor, "batch *where tokens"],
    impermissible: Bool[Tensor, "batch tokens"],
    lam: float = 1.0,
    reduce: Reduce = "mean",
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> MassPenalty:
    """`R = -lam log(1 - sum_(i in I) a_i)`, mean over the items: 0 without mass on I, growing without bound towards all of it.

    Args:
        attention: `[batch, tokens]`; of several heads `[batch, heads, tokens]`; of a whole model `[batch, layers, heads,
            queries, keys]`, of which the last layer's row of the first real token ([CLS]) is taken.
        impermissible: I; where padding is in it, it does not count.
        lam: strength.
        reduce: of several heads: `"mean"`; `"max"`: of each item the head with most mass; `"batch_min"`: of the whole batch the
            one row with most mass, as in the authors' code.
        mask: True on real tokens.

    Raises:
        InputError: for other shapes.

    >>> found = attention_mass_penalty(torch.full((1, 4), 0.25), torch.tensor([[True, True, False, False]]))
    >>> round(float(found.loss), 4), float(found.mass)
    (0.6931, 0.5)
    """
    require_one_of(get_args(Reduce), reduce=reduce)
    real = torch.ones_like(impermissible) if mask is None else mask
    if real.shape != impermissible.shape or (len(attention), attention.shape[-1]) != impermissible.shape:
        raise InputError(
            f"impermissible, mask: expected [batch, tokens] of attention {list(attention.shape)}, got "
            f"{list(impermissible.shape)} and {list(real.shape)}"
        )
    rows = _rows(attention, real)
    mass = rows.masked_fill(~(impermissible & real)[:, None], 0.0).sum(-1)
    # not minus the mean: a sum of nothing is 0, and not -0
    left = (1 - mass).clamp(min=LEAST).log()
    by_heads = left.mean() if reduce == "mean" else left.amin(1).mean() if reduce == "max" else left.amin()
    padding = rows.masked_fill(real[:, None], 0.0).sum(-1)
    return MassPenalty(0 - lam * by_heads, mass.mean(), mass.amax(), padding.mean())


def aligned_mass_penalty(
    attention: Float[Tensor, "batch targets sources"],
    impermissible: Bool[Tensor, "batch targets sources"],
    lam: float = 1.0,
    target_mask: Bool[Tensor, "batch targets"] | None = None,
) -> MassPenalty:
    """`R = -lam log(1 - M / T)`: `M` all mass that real target steps put on their impermissible sources, `T` their number.

    Args:
        attention: of each target step over the source.
        impermissible: for each target step; `aligned` makes it.
        lam: strength.
        target_mask: True on target steps that are no padding.

    >>> one = torch.eye(3).unsqueeze(0)
    >>> round(float(aligned_mass_penalty(0.5 * one, one.bool()).loss), 4)
    0.6931
    """
    if attention.shape != impermissible.shape:
        raise InputError(f"impermissible: expected {list(attention.shape)}, got {list(impermissible.shape)}")
    real = torch.ones_like(impermissible[..., 0]) if target_mask is None else target_mask
    mass = attention.masked_fill(~impermissible, 0.0).sum(-1).masked_fill(~real, 0.0)
    share = mass.sum() / real.sum().clamp(min=1)
    outside = attention.new_zeros(())
    return MassPenalty(0 - lam * (1 - share).clamp(min=LEAST).log(), share, mass.amax(), outside)


def entropy_reward(
    attention: Float[Tensor, "batch tokens"], beta: float = 1.0, mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, ""]:
    """`-beta H(a)`, mean over the items: with `beta` above 0 even attention is rewarded.

    >>> round(float(entropy_reward(torch.full((2, 4), 0.25))), 4)
    -1.3863
    """
    a = attention if mask is None else attention.masked_fill(~mask, 0.0)
    return beta * torch.xlogy(a, a.clamp(min=torch.finfo(a.dtype).tiny)).sum(1).mean()


def distance_reward(
    attention: Float[Tensor, "batch tokens"],
    stored: Float[Tensor, "batch tokens"],
    coef: float = 1.0,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """`-coef sum_i a_i log(a_i / q_i)`, mean over the items: with `coef` above 0 attention is pushed away from the stored `q`.

    >>> round(float(distance_reward(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))), 4)
    -0.6931
    """
    if stored.shape != attention.shape:
        raise InputError(f"stored: expected {list(attention.shape)} as the attention, got {list(stored.shape)}")
    tiny = torch.finfo(attention.dtype).tiny
    a = attention if mask is None else attention.masked_fill(~mask, 0.0)
    ratio = a.clamp(min=tiny).log() - stored.clamp(min=tiny).log()
    return -coef * (a * ratio).sum(1).mean()


def _rows(
    attention: Float[Tensor, "batch *where tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch heads tokens"]:
    if attention.dim() == 2:
        return attention[:, None]
    if attention.dim() == 3:
        return attention
    if attention.dim() != 5:
        raise InputError(
            f"attention: expected [batch, tokens], [batch, heads, tokens] or [batch, layers, heads, queries, keys], "
            f"got {list(attention.shape)}"
        )
    last = attention[:, -1]
    if last.shape[-2] != mask.shape[1]:
        raise InputError(f"attention: expected {mask.shape[1]} queries, as there are tokens, got {last.shape[-2]}")
    first = first_tokens(mask).to(torch.uint8).argmax(1)
    return last[torch.arange(len(last), device=last.device), :, first]
