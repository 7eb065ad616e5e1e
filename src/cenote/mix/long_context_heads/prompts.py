"""The criterion for every query of a text, without a map of all tokens.

Source: Donhauser et al. (2025), arXiv 2502.09647.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.requirements import require_at_least
from cenote.mix.long_context_heads.criterion import Masses, Moments, local_keys, masses

ROWS = 128
"""Queries at a time."""


class Looked(NamedTuple):
    """Of each query and head of a text.

    Attributes:
        near: log mass of near keys, `[batch, heads, tokens]`.
        far: exact log mass of far keys; None where it was not asked for.
        guessed: log mass of far keys by their moments.
        away: how many keys are far, `[batch, tokens]`.
        local: what near keys alone give, `[batch, heads, tokens, value_width]`.
        moments: of the keys that are far from the last query, of each head of keys.
    """

    near: Float[Tensor, "batch heads tokens"]
    far: Float[Tensor, "batch heads tokens"] | None
    guessed: Float[Tensor, "batch heads tokens"]
    away: Int[Tensor, "batch tokens"]
    local: Float[Tensor, "batch heads tokens value_width"]
    moments: Moments

    @property
    def exact(self) -> Masses:
        """With the exact far mass, which the oracle reads."""
        assert self.far is not None
        return Masses(self.near, self.far)

    @property
    def estimated(self) -> Masses:
        """With the far mass by moments."""
        return Masses(self.near, self.guessed)


def look(
    q: Float[Tensor, "batch heads tokens width"],
    k: Float[Tensor, "batch kv_heads tokens width"],
    v: Float[Tensor, "batch kv_heads tokens value_width"],
    real: Bool[Tensor, "batch tokens"] | None = None,
    *,
    sinks: int = 16,
    window: int = 1024,
    scale: float | None = None,
    exact: bool = False,
    known: Moments | None = None,
    rows: int = ROWS,
) -> Looked:
    """Near masses, and what is expected of far keys, of every query; keys become far as the window leaves them behind.

    Args:
        q, k, v: after positions, real tokens on the left.
        real: False on padding.
        sinks: first tokens that are always near; their scores are outliers, and never enter the moments.
        window: last tokens that are near.
        scale: of scores, `width^-0.5` by default.
        exact: also the exact far masses, for which all keys are read.
        known: moments of each head of keys from elsewhere, `[kv_heads]`, in place of those of this text's far keys.
        rows: queries at a time.
    """
    require_at_least(1, rows=rows)
    batch, tokens, kv_heads = q.shape[0], q.shape[2], k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if real is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=q.device)
    number = torch.arange(tokens, device=q.device)
    grouped = q.unflatten(1, (kv_heads, -1))
    so_far = Moments.none(k)
    found: dict[str, list[Tensor]] = {"near": [], "far": [], "guessed": [], "local": []}
    done = sinks
    for start in range(0, tokens, rows):
        ends = min(start + rows, tokens)
        asked = number[start:ends]
        # far from the first of these queries
        until = max(done, start - window + 1)
        so_far = so_far.with_(k[:, :, done:until], real[:, None, done:until])
        done = until
        first = min(until, start)
        head = min(sinks, first)
        seen = torch.cat([number[:head], number[first:ends]])
        queries = grouped[:, :, :, start:ends].flatten(2, 3)
        scores = (queries @ k[:, :, seen].mT).to(so_far.mean.dtype) * scale
        scores = scores.unflatten(2, (-1, len(asked)))
        near = local_keys(seen, asked, sinks, window) & real[:, None, None, None, seen]
        mass = masses(scores, near)
        found["near"].append(mass.near)
        weights = (scores - mass.near[..., None].masked_fill(mass.near[..., None] == float("-inf"), 0.0)).exp()
        weights = weights.masked_fill(~near, 0.0).to(v.dtype)
        found["local"].append(weights @ v[:, :, None, seen])
        # of far keys that came after `until`, one by one
        late = (number[until:ends] <= asked[:, None] - window) & real[:, None, None, None, until:ends]
        found["guessed"].append(_guessed(queries, k[:, :, until:ends], late, so_far, known, scale))
        if exact:
            every = (queries @ k[:, :, :ends].mT).to(scores.dtype).unflatten(2, (-1, len(asked))) * scale
            at = number[:ends]
            far = (at >= sinks) & (at <= asked[:, None] - window) & real[:, None, None, None, :ends]
            found["far"].append(masses(every, far).near)
    # each text ends where it ends
    away = real & (number >= sinks) & (number < real.sum(1, keepdim=True) - window)
    count = (number - window + 1 - sinks).clamp(min=0) * real
    together = {name: torch.cat(parts, 3).flatten(1, 2) for name, parts in found.items() if parts}
    return Looked(
        together["near"],
        together.get("far"),
        together["guessed"],
        count,
        together["local"],
        Moments.of(k, away[:, None]),
    )


def _guessed(
    queries: Tensor, late_keys: Tensor, late: Tensor, so_far: Moments, known: Moments | None, scale: float
) -> Float[Tensor, "batch kv_heads group queries"]:
    """`log n + m + v / 2`, by the moments so far and the keys that become far among these queries."""
    asked = queries.to(so_far.mean.dtype).unflatten(2, (-1, late.shape[-2]))
    count = so_far.keys[..., None, None] + late.sum(-1)
    if known is not None:
        mean = torch.einsum("bkgqd,kd->bkgq", asked, known.mean.to(asked.dtype)) * scale
        spread = torch.einsum("bkgqd,kde,bkgqe->bkgq", asked, known.covariance.to(asked.dtype), asked) * scale**2
        return count.to(asked.dtype).log() + mean + spread / 2
    base = torch.einsum("bkgqd,bkd->bkgq", asked, so_far.mean) * scale
    square = torch.einsum("bkgqd,bkde,bkgqe->bkgq", asked, so_far.covariance, asked) * scale**2
    apart = late_keys.to(asked.dtype) - so_far.mean[:, :, None]
    beyond = torch.einsum("bkgqd,bktd->bkgqt", asked, apart).masked_fill(~late, 0.0) * scale
    of = count.clamp(min=1).to(asked.dtype)
    shift = beyond.sum(-1) / of
    spread = (so_far.keys[..., None, None] * square + beyond.square().sum(-1)) / of - shift.square()
    return count.to(asked.dtype).log() + base + shift + spread / 2
