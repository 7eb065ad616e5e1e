"""How much of its attention a query leaves near: exactly, and from the mean and covariance of the far keys alone.

Source: Donhauser, Arnal, Pezeshki, Cabannes, Lopez-Paz, Ahuja, "Unveiling Simplicities of Attention: Adaptive Long-Context Head
Identification" (2025), arXiv 2502.09647. No code was found; widths of windows, and where moments come from, are inferred.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of

Form = Literal["full", "diagonal", "low-rank"]


def local_keys(
    positions: Int[Tensor, "*batch keys"], query: Int[Tensor, "*#batch queries"], sinks: int, window: int
) -> Bool[Tensor, "*batch queries keys"]:
    """Which keys are near to a query: the first `sinks` tokens and the last `window` up to the query; later ones are not.

    Args:
        positions: of the keys, from 0; negative for padding.
        query: positions of the queries.
        sinks, window: as above.

    Example:
        >>> local_keys(torch.arange(6), torch.tensor([5]), sinks=1, window=2)
        tensor([[ True, False, False, False,  True,  True]])
    """
    require_at_least(0, sinks=sinks)
    require_at_least(1, window=window)
    behind = query[..., :, None] - positions[..., None, :]
    at = positions[..., None, :]
    return (behind >= 0) & (at >= 0) & ((behind < window) | (at < sinks))


class Masses(NamedTuple):
    """Logarithms of what near and far keys have of `sum exp(score)`; -inf of none.

    Attributes:
        near, far: `[..., queries]`.
    """

    near: Float[Tensor, "*queries"]
    far: Float[Tensor, "*queries"]

    @property
    def share(self) -> Float[Tensor, "*queries"]:
        """`rho = A_near / (A_near + A_far)`; 1 where nothing is far."""
        return torch.sigmoid(self.near - self.far).masked_fill(self.far == float("-inf"), 1.0)

    def local(self, tau: float) -> Bool[Tensor, "*queries"]:
        """Whether the share is `tau` or more: compared in logarithms, and always so where nothing is far.

        Raises:
            InputError: for a threshold that is no share.
        """
        return self.near - self.far >= _logit(tau)


def masses(scores: Float[Tensor, "*queries keys"], near: Bool[Tensor, "*#queries keys"]) -> Masses:
    """The exact masses.

    Args:
        scores: scaled; -inf where a key may not be read.
        near: which keys are near.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    parts = (wide.masked_fill(hidden, float("-inf")) for hidden in (~near, near))
    return Masses(*(_logsumexp(part) for part in parts))


class Moments(NamedTuple):
    """Of the far keys of a head, at least float32.

    Attributes:
        keys: how many, `[...]`.
        mean: `[..., width]`.
        covariance: of the population, `[..., width, width]`.
    """

    keys: Num[Tensor, "*heads"]
    mean: Float[Tensor, "*heads width"]
    covariance: Float[Tensor, "*heads width width"]

    @classmethod
    def of(cls, keys: Float[Tensor, "*heads keys width"], among: Bool[Tensor, "*#heads keys"] | None = None) -> Moments:
        """Those of keys, or of some among them; zeros where there is none."""
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        among = torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device) if among is None else among
        among = among.expand(keys.shape[:-1])
        counted = among.sum(-1).to(wide.dtype)
        of = counted.clamp(min=1)
        mean = wide.masked_fill(~among[..., None], 0.0).sum(-2) / of[..., None]
        centred = (wide - mean[..., None, :]).masked_fill(~among[..., None], 0.0)
        return cls(counted, mean, centred.mT @ centred / of[..., None, None])

    @classmethod
    def none(cls, like: Float[Tensor, "*heads keys width"]) -> Moments:
        """Of no keys yet, for heads as these."""
        return cls.of(like[..., :0, :])

    def with_(
        self, keys: Float[Tensor, "*heads keys width"], among: Bool[Tensor, "*#heads keys"] | None = None
    ) -> Moments:
        """Those of these keys too (Chan's form of Welford's update): what running over tokens comes to."""
        new = Moments.of(keys, among)
        count = self.keys + new.keys
        share = (new.keys / count.clamp(min=1))[..., None]
        apart = new.mean - self.mean
        mean = self.mean + share * apart
        between = (share * (1 - share))[..., None] * apart[..., :, None] * apart[..., None, :]
        within = (1 - share[..., None]) * self.covariance + share[..., None] * new.covariance
        return Moments(count, mean, within + between)

    def as_(self, form: Form, rank: int = 8) -> Moments:
        """With a covariance that costs less: its diagonal, or its `rank` largest directions and the rest spread evenly."""
        require_one_of(get_args(Form), form=form)
        if form == "full":
            return self
        if form == "diagonal":
            return self._replace(covariance=torch.diag_embed(self.covariance.diagonal(dim1=-2, dim2=-1)))
        require_at_least(1, rank=rank)
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values.flip(-1).clamp(min=0)
        width = kept.shape[-1]
        rest = kept[..., rank:].mean(-1, keepdim=True) if rank < width else kept.new_zeros(*kept.shape[:-1], 1)
        kept = torch.cat([kept[..., :rank], rest.expand(*kept.shape[:-1], max(0, width - rank))], -1)
        vectors = vectors.flip(-1)
        return self._replace(covariance=(vectors * kept[..., None, :]) @ vectors.mT)


def expected(
    q: Float[Tensor, "*heads queries width"],
    moments: Moments,
    scale: float | None = None,
    longest: Float[Tensor, "*heads"] | None = None,
) -> Float[Tensor, "*heads queries"]:
    """What the far keys are expected to have, from their moments: `log n + q.mu s + q'Sigma q s^2 / 2`.

    Scores of Gaussian keys are Gaussian, and the mean of `e^score` is then `e^(m + v / 2)`. All queries of a head are one
    product with its covariance.

    Args:
        q: queries, of the heads that the moments are of.
        moments: of far keys.
        scale: `s`, `width^-0.5` by default.
        longest: length of the longest far key: no score is larger than `|q| |k| s`, and no expectation then exceeds
            `log n + |q| |k| s` (inferred).

    Returns:
        -inf where no key is far.
    """
    s = q.shape[-1] ** -0.5 if scale is None else scale
    wide = q.to(moments.mean.dtype)
    mean = (wide @ moments.mean[..., None])[..., 0] * s
    spread = ((wide @ moments.covariance) * wide).sum(-1) * s**2
    inside = mean + spread / 2
    if longest is not None:
        inside = torch.minimum(inside, wide.norm(dim=-1) * longest.to(wide.dtype)[..., None] * s)
    return moments.keys.to(wide.dtype).log()[..., None] + inside


def static_labels(shares: Float[Tensor, "blocks heads"], local: float) -> Bool[Tensor, "blocks heads"]:
    """The heads that are always local: the given share of all, those whose queries were local most often.

    Args:
        shares: of each head, how many of the queries of calibration were local.
        local: share of heads.

    Example:
        >>> static_labels(torch.tensor([[0.9, 0.1], [0.5, 0.8]]), 0.5)
        tensor([[ True, False],
                [False,  True]])
    """
    if not 0 <= local <= 1:
        raise InputError(f"local: expected a share from 0 to 1, got {local}")
    flat = shares.flatten()
    labels = torch.zeros_like(flat, dtype=torch.bool)
    labels[flat.argsort(descending=True, stable=True)[: round(local * len(flat))]] = True
    return labels.view_as(shares)


def _logit(tau: float) -> float:
    if not 0 <= tau <= 1:
        raise InputError(f"tau: expected a share from 0 to 1, got {tau}")
    if tau in (0, 1):
        return float("-inf") if tau == 0 else float("inf")
    return math.log(tau / (1 - tau))


def _logsumexp(x: Tensor) -> Tensor:
    # of a row of -inf, whose gradient would be NaN
    nothing = (x == float("-inf")).all(-1)
    return x.masked_fill(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, float("-inf"))
