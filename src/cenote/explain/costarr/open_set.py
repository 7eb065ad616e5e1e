"""Measures of scores that tell known from unknown, and the scores that are usual.

All scores are larger for what is more likely known.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least

Scores = Float[Tensor, "items"]


def auroc(known: Float[Tensor, "known"], unknown: Float[Tensor, "unknown"]) -> float:
    """The chance that a known sample scores above an unknown one, ties half.

    >>> auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    _require(known, unknown)
    more = (known[:, None] > unknown[None]).double() + (known[:, None] == unknown[None]).double() / 2
    return float(more.mean())


def fpr_at(known: Float[Tensor, "known"], unknown: Float[Tensor, "unknown"], accept: float = 0.95) -> float:
    """The share of unknown samples that pass where a share of the known ones does.

    >>> fpr_at(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([2.5, 0.5]), 0.75)
    0.5
    """
    _require(known, unknown)
    if not 0 < accept <= 1:
        raise InputError(f"accept: expected a share above 0, up to 1, got {accept}")
    needed = int(np.ceil(accept * len(known) - 1e-9))
    threshold = known.sort(descending=True).values[needed - 1]
    return float((unknown >= threshold).double().mean())


def oscr(known: Float[Tensor, "known"], correct: Bool[Tensor, "known"], unknown: Float[Tensor, "unknown"]) -> float:
    """The area under the rate of known samples that pass and are classified correctly, against that of unknown ones that pass.

    >>> known, unknown = torch.tensor([3.0, 2.0]), torch.tensor([1.0])
    >>> oscr(known, torch.tensor([True, True]), unknown), oscr(known, torch.tensor([True, False]), unknown)
    (1.0, 0.5)
    """
    _require(known, unknown)
    thresholds = torch.cat([known, unknown]).unique().flip(0)
    right = (known[correct][None] >= thresholds[:, None]).double().sum(1) / len(known)
    false = (unknown[None] >= thresholds[:, None]).double().mean(1)
    right, false = (torch.cat([torch.zeros(1, dtype=torch.float64), x.cpu()]) for x in (right, false))
    return float(torch.trapezoid(right, false))


def max_probability(logits: Float[Tensor, "items classes"]) -> Scores:
    """The largest softmax probability (MSP)."""
    return logits.softmax(1).amax(1)


def max_logit(logits: Float[Tensor, "items classes"]) -> Scores:
    """The largest logit."""
    return logits.amax(1)


def energy(logits: Float[Tensor, "items classes"], temperature: float = 1.0) -> Scores:
    """The negative energy, `T logsumexp(z / T)`."""
    return temperature * (logits / temperature).logsumexp(1)


def nearest(features: Float[Tensor, "items dim"], training: Float[Tensor, "training dim"], k: int = 10) -> Scores:
    """The negative distance to the k-th nearest training sample, on the sphere (Sun et al. 2022)."""
    require_at_least(1, k=k)
    one, other = (torch.nn.functional.normalize(x, dim=1) for x in (features, training))
    return -torch.cdist(one, other).kthvalue(min(k, len(training)), dim=1).values


def _require(known: Tensor, unknown: Tensor) -> None:
    if not len(known) or not len(unknown):
        raise InputError(f"known, unknown: expected at least one sample of each, got {len(known)} and {len(unknown)}")
