"""Which neurons a prompt uses, which tokens use these, and where the elbow of their numbers is."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.reduce.basic.controls import largest

FEWEST = 3
"""Of fewer scores there is no elbow."""


def core_neurons(
    activations: Float[Tensor, "batch tokens neurons"],
    share: float = 0.4,
    token_share: float = 0.2,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    *,
    one_limit: bool = False,
) -> Bool[Tensor, "batch neurons"]:
    """The neurons that are strongly active for most tokens of a prompt.

    `f(n) = #{t : n among the largest floor(rho #{a_tn > 0}) of token t}`; the `floor(beta F)` neurons of largest `f`, the first
    ones among equals; fewer where fewer are ever among the largest.

    Args:
        activations: what the map back to the states reads, `act(gate x) * up x`.
        share: `beta`, of all neurons.
        token_share: `rho`, of a token's positive neurons.
        mask: True = a real token, None for all.
        one_limit: one number of neurons for all tokens, from the mean number of positive ones, as CoreInfer has it.

    Source:
        Wang et al. 2025, "CoreMatching", arXiv 2505.19235, section 3.
    """
    for name, given in (("share", share), ("token_share", token_share)):
        if not 0 < given <= 1:
            raise InputError(f"{name}: expected a share above 0 and at most 1, got {given!r}")
    real = _real(activations, mask)
    active = (activations > 0) & real[..., None]
    positive = active.sum(-1)
    if one_limit:
        mean = positive.sum(1, keepdim=True).double() / real.sum(1, keepdim=True).clamp(min=1)
        limits = _floor(token_share * mean).expand_as(positive)
    else:
        limits = _floor(token_share * positive.double())
    frequency = _strongest(activations.masked_fill(~active, 0.0), active, limits).sum(1, dtype=torch.int32)
    counts = torch.full((len(frequency),), int(_floor(torch.tensor(share * activations.shape[-1]))))
    return largest(frequency.double(), counts.to(frequency.device), frequency > 0)


def _strongest(
    values: Float[Tensor, "batch tokens neurons"],
    active: Bool[Tensor, "batch tokens neurons"],
    limits: Int[Tensor, "batch tokens"],
) -> Bool[Tensor, "batch tokens neurons"]:
    """The largest active neurons of each token, so many; the first ones among equals."""
    limits = torch.minimum(limits, active.sum(-1))
    most = int(limits.max()) if limits.numel() else 0
    if not most:
        return torch.zeros_like(active)
    last = values.topk(most, -1).values.gather(-1, (limits - 1).clamp(min=0)[..., None])
    above, equal = values > last, (values == last) & active
    free = limits[..., None] - above.sum(-1, keepdim=True)
    return active & (limits > 0)[..., None] & (above | (equal & (equal.cumsum(-1) <= free)))


def matching(
    activations: Float[Tensor, "batch tokens neurons"], core: Bool[Tensor, "batch neurons"]
) -> Int[Tensor, "batch tokens"]:
    """How many of the core neurons each token activates: `m(x) = #{n in core : a_n > 0}`, int32."""
    # products of zeros and ones are exact in float32 up to 2^24 neurons
    return ((activations > 0).float() @ core.float()[..., None])[..., 0].to(torch.int32)


def token_neurons(
    activations: Float[Tensor, "batch tokens neurons"],
    number: int = -5,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch neurons"]:
    """The neurons that one token activates, in place of the core: the released code takes the fifth token from the end.

    Args:
        activations: as in `core_neurons`.
        number: of the token among the real ones, negative from the end.
        mask: True = a real token, None for all.
    """
    real = _real(activations, mask)
    lengths = real.sum(1)
    wanted = number if number >= 0 else lengths + number
    at = real & (real.cumsum(1) - 1 == torch.as_tensor(wanted, device=real.device).reshape(-1, 1))
    if not bool(at.any(1).all()):
        raise InputError(f"number: {number} is no token of an item of {int(lengths.min())} tokens")
    return activations[at] > 0


def elbow(scores: Tensor, mask: Bool[Tensor, "batch tokens"] | None = None) -> Float[Tensor, "batch"]:
    """The score at the elbow of the sorted scores: of the points `(i, m_(i))` that farthest from the chord of first and last.

    The first one among equals; where all lie on the chord that is the largest score. NaN for an empty set.

    Args:
        scores: `[batch, tokens]`.
        mask: True = a score that counts, None for all.

    Example:
        >>> elbow(torch.tensor([[9, 9, 8, 2, 1, 1, 0]])).tolist()
        [2.0]

    Source:
        Wang et al. 2025, arXiv 2505.19235: the threshold of maximum geometric distance.
    """
    if scores.dim() != 2:
        raise InputError(f"scores: expected [batch, tokens], got {list(scores.shape)}")
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    counts = mask.sum(1, keepdim=True)
    if not scores.shape[1]:
        return torch.full((len(scores),), math.nan, dtype=torch.float64, device=scores.device)
    # whole numbers stay exact
    falling = scores.double().masked_fill(~mask, -torch.inf).sort(dim=1, descending=True).values
    last = (counts - 1).clamp(min=0)
    first, end = falling[:, :1], falling.gather(1, last)
    at = torch.arange(scores.shape[1], device=scores.device).expand_as(falling)
    falling = torch.where(at < counts, falling, first.nan_to_num(neginf=0.0))
    # the distance up to the length of the chord, which is the same for all
    apart = (last * (falling - first) - (end - first) * at).abs().masked_fill(at >= counts, -1.0)
    found = falling.gather(1, apart.argmax(1, keepdim=True))
    return torch.where(counts > 0, found, math.nan)[:, 0]


def above_elbow(
    scores: Tensor, mask: Bool[Tensor, "batch tokens"] | None = None, *, strict: bool = False, minimum: int = 1
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens score at least as much as the elbow; all of a set of fewer than three, and where none would be left.

    Args:
        scores: `[batch, tokens]`.
        mask: True = a score that counts, None for all.
        strict: more than the elbow, as in the released code.
        minimum: at least so many are left, the largest; of a set that has fewer, all.
    """
    if minimum < 1:
        raise InputError(f"minimum: expected at least 1, got {minimum}")
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    limit = elbow(scores, mask)[:, None]
    kept = mask & ((scores.double() > limit) if strict else (scores.double() >= limit))
    counts = mask.sum(1, keepdim=True)
    kept = torch.where((counts < FEWEST) | ~kept.any(1, keepdim=True), mask, kept)
    least = torch.minimum(counts[:, 0], torch.full_like(counts[:, 0], minimum))
    return kept | largest(scores.double(), least, mask)


def projections(
    weights: Float[Tensor, "*heads tokens"], values: Float[Tensor, "*heads tokens width"]
) -> Float[Tensor, "*heads tokens"]:
    """What each token adds to an attention output along its direction: `a_i |v_i| cos(v_i, o)` with `o = sum_i a_i v_i`.

    They sum to `|o|`. Zeros where the output is zero.

    Args:
        weights: of one query.
        values: of the tokens.

    Source:
        Wang et al. 2025, arXiv 2505.19235: the projection-guided criterion.
    """
    out = (weights[..., None] * values).sum(-2, keepdim=True)
    length = out.norm(dim=-1)
    along = (values * out).sum(-1) / length.clamp(min=torch.finfo(out.dtype).tiny)
    return torch.where(length > 0, weights * along, torch.zeros_like(along))


def object_share(
    kept: Bool[Tensor, "batch tokens"], on_object: Bool[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """Of the kept tokens, and of all, the share that lies on the object; 0 of none.

    Example:
        >>> kept = torch.tensor([[True, True, False, False]])
        >>> kept_share, area = object_share(kept, torch.tensor([[True, False, False, False]]))
        >>> kept_share.item(), area.item()
        (0.5, 0.25)
    """
    if kept.shape != on_object.shape:
        raise InputError(f"on_object: expected {list(kept.shape)} as kept, got {list(on_object.shape)}")
    both = (kept & on_object).sum(1).float()
    return both / kept.sum(1).clamp(min=1), on_object.float().mean(1) if kept.shape[1] else both


def _floor(x: Tensor) -> Int[Tensor, "*shape"]:
    # 0.29 * 100 is 28.999999999999996
    return x.double().mul(1e9).round().div(1e9).floor().long()


def _real(activations: Tensor, mask: Tensor | None) -> Bool[Tensor, "batch tokens"]:
    if activations.dim() != 3:
        raise InputError(f"activations: expected [batch, tokens, neurons], got {list(activations.shape)}")
    if mask is None:
        return torch.ones(activations.shape[:2], dtype=torch.bool, device=activations.device)
    if mask.shape != activations.shape[:2]:
        raise InputError(f"mask: expected {list(activations.shape[:2])} as the tokens, got {list(mask.shape)}")
    return mask
