"""Causal mixing in linear time: a running softmax without queries, and Taylor expansions of softmax.

Source: Xue, Moosavi, Aletras, "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.segments import accumulation_dtype

Heads = Float[Tensor, "batch heads tokens width"]
FAINT = -1e30
SMALL = 1e-12
CHUNK = 64


class RunningMean(NamedTuple):
    """What a running softmax has seen: a mean of values and the logarithm of the sum of their weights.

    Attributes:
        mean: `[batch, heads, width]`.
        log_mass: `[batch, heads]`.
    """

    mean: Float[Tensor, "batch heads width"]
    log_mass: Float[Tensor, "batch heads"]


def running_softmax(
    scores: Float[Tensor, "batch heads tokens"],
    v: Heads,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    before: RunningMean | None = None,
) -> tuple[Heads, RunningMean]:
    """`o_i = sum_(j <= i) e^(s_j) v_j / sum_(j <= i) e^(s_j)`, no exponent of it above 0.

    Args:
        scores: one number per token and head.
        v: values.
        mask: True = a real token, None for all.
        before: what came before, to go on from.

    Returns:
        The running means, zeros where no real token has come yet, and the state behind the last token.
    """
    wide = accumulation_dtype(v.dtype)
    mass, mean = scores.to(wide), v.to(wide)
    if mask is not None:
        mass = mass.masked_fill(~mask.unsqueeze(1), FAINT)
        mean = mean.masked_fill(~mask[:, None, :, None], 0.0)
    if before is not None:
        mass = torch.cat([before.log_mass.to(wide).unsqueeze(2), mass], 2)
        mean = torch.cat([before.mean.to(wide).unsqueeze(2), mean], 2)
    # twice as many tokens are in each mean after each step
    reach, n = 1, mass.shape[2]
    while reach < n:
        behind = F.pad(mass[..., :-reach], (reach, 0), value=FAINT)
        earlier = F.pad(mean[:, :, :-reach], (0, 0, reach, 0))
        # shares that sum to 1 whatever the logarithms are rounded to
        own = (mass - behind).sigmoid().unsqueeze(-1)
        mean = mean * own + earlier * (1 - own)
        mass, reach = torch.logaddexp(mass, behind), 2 * reach
    state = RunningMean(mean[:, :, -1], mass[:, :, -1])
    return mean[:, :, n - v.shape[2] :].to(v.dtype), state


def token_scores(q: Heads, k: Heads) -> Float[Tensor, "batch heads tokens"]:
    """`s_j = q_j . k_j / sqrt(width)`: of a token with itself."""
    return (q * k).sum(-1) * q.shape[-1] ** -0.5


class Moments(NamedTuple):
    """Running sums over the tokens that came: of features times values, and of features.

    Attributes:
        values: `[batch, heads, features, width]`.
        keys: `[batch, heads, features]`.
    """

    values: Float[Tensor, "batch heads features width"]
    keys: Float[Tensor, "batch heads features"]


Features = Callable[[Tensor], Tensor]


def linear_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    features: Features,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    before: Moments | None = None,
    chunk: int = CHUNK,
) -> tuple[Heads, Float[Tensor, "batch heads tokens"], Moments]:
    """`sum_(j <= i) f(q_i) . f(k_j) v_j` and `sum_(j <= i) f(q_i) . f(k_j)`, in time linear in the tokens.

    Args:
        q, k, v: queries, keys, values.
        features: `f`.
        mask: True = a real token, None for all.
        before: sums over what came before.
        chunk: so many tokens are read pair by pair, those before them by their sums.

    Returns:
        Both sums, and the moments behind the last token.
    """
    sums, masses = [], []
    state = before
    for start in range(0, k.shape[2], chunk):
        part = slice(start, start + chunk)
        at, of, held = features(q[:, :, part]), features(k[:, :, part]), v[:, :, part]
        if mask is not None:
            of = of * mask[:, None, part, None]
            held = held.masked_fill(~mask[:, None, part, None], 0.0)
        pairs = (at @ of.mT).tril()
        total, mass = pairs @ held, pairs.sum(-1)
        if state is not None:
            total, mass = total + at @ state.values, mass + (at @ state.keys.unsqueeze(-1)).squeeze(-1)
        sums.append(total)
        masses.append(mass)
        own = Moments(of.mT @ held, of.sum(2))
        state = own if state is None else Moments(state.values + own.values, state.keys + own.keys)
    assert state is not None
    return torch.cat(sums, 2), torch.cat(masses, 2), state


def expansion(x: Heads) -> Float[Tensor, "batch heads tokens features"]:
    """Features whose products are `1 + s + s^2 / 2`, with `s = q . k / sqrt(width)`: `1 + width + width^2` of them."""
    x = x * x.shape[-1] ** -0.25
    second = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, second], -1)


def taylor_joint(
    q: Heads, k: Heads, v: Heads, mask: Bool[Tensor, "batch tokens"] | None = None, before: Moments | None = None
) -> tuple[Heads, Moments]:
    """`o_i = sum_j w_ij v_j / sum_j w_ij`, `w = 1 + s + s^2 / 2`, over `j <= i`; weights are 1/2 or more.

    Args:
        q, k, v: queries, keys, values.
        mask: True = a real token, None for all.
        before: what came before, to go on from.

    Returns:
        The output, and the state behind the last token.
    """
    total, mass, state = linear_attention(q, k, v, expansion, mask, before)
    return total / mass.clamp(min=torch.finfo(mass.dtype).tiny).unsqueeze(-1), state


def taylor_literal(
    q: Heads,
    k: Heads,
    v: Heads,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    before: tuple[Moments, ...] | None = None,
) -> tuple[Heads, tuple[Moments, ...]]:
    """The recurrence as printed: each order divided by a sum of its own, squares by channel.

    `o = mean(v) + sum (q . k_j) v_j / sum q . k_j + sum (q^2 . k_j^2) v_j / sum q^2 . k_j^2`; the second divisor may come near
    0, and is kept away from it, sign kept.

    Args:
        q, k, v, mask, before: as of `taylor_joint`, a state for each order.

    Returns:
        The output, and the states behind the last token.
    """
    orders: tuple[Features, ...] = (lambda x: torch.ones_like(x[..., :1]), lambda x: x, torch.square)
    out, states = torch.zeros_like(v), []
    for i, features in enumerate(orders):
        total, mass, state = linear_attention(q, k, v, features, mask, None if before is None else before[i])
        least = torch.full_like(mass, SMALL).copysign(mass)
        out = out + total / torch.where(mass.abs() < SMALL, least, mass).unsqueeze(-1)
        states.append(state)
    return out, tuple(states)
