"""What heads do, beside what they are worth, and whether taking one out changes a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from cenote.compare.metrics import spearman
from cenote.core import InputError
from cenote.core.requirements import require_at_least

TINY = 1e-12
DRAWS = 2000
AT_ONCE = 200


class HeadStatistics(NamedTuple):
    """Of one place, means over real queries.

    Attributes:
        entropy: of each head's weights, in nats, `[heads]`.
        divergence: `KL(p_i || p_j)` of each two heads, `[heads, heads]`.
        outputs: `cos(y_i, y_j)` of their outputs, mean over all pairs: high where heads do not disagree.
        attention: `p_i . p_j`, likewise.
        offset: how far behind itself a query reads, in tokens, `[heads]`.
    """

    entropy: Float[Tensor, "heads"]
    divergence: Float[Tensor, "heads heads"]
    outputs: Float[Tensor, ""]
    attention: Float[Tensor, ""]
    offset: Float[Tensor, "heads"]


def statistics_of(
    weights: Float[Tensor, "batch heads queries keys"],
    contexts: Float[Tensor, "batch heads queries width"],
    mask: Bool[Tensor, "batch queries"] | None = None,
) -> HeadStatistics:
    """Of weights and outputs of heads.

    >>> even = torch.full((1, 2, 2, 2), 0.5)
    >>> found = statistics_of(even, torch.ones(1, 2, 2, 3))
    >>> found.attention.item(), found.offset.tolist()
    (0.5, [0.0, 0.0])
    """
    real = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool) if mask is None else mask
    real = real.to(weights.device)
    if real.shape != (weights.shape[0], weights.shape[2]):
        raise InputError(
            f"mask: expected {[weights.shape[0], weights.shape[2]]} as the queries, got {list(real.shape)}"
        )
    p, y = weights.transpose(1, 2)[real], contexts.transpose(1, 2)[real].to(weights.dtype)
    logs = p.clamp(min=TINY).log()
    entropy = -(p * logs).sum(-1)
    cross = -torch.einsum("nik,njk->nij", p, logs)
    unit = F.normalize(y, dim=-1)
    queries = torch.arange(weights.shape[2], device=p.device).expand(len(real), -1)[real]
    keys = torch.arange(weights.shape[3], device=p.device, dtype=p.dtype)
    return HeadStatistics(
        entropy.mean(0),
        (cross - entropy[:, :, None]).mean(0),
        torch.einsum("niw,njw->nij", unit, unit).mean(),
        torch.einsum("nik,njk->nij", p, p).mean(),
        (queries[:, None] - p @ keys).mean(0),
    )


def mean_statistics(found: Sequence[tuple[HeadStatistics, int]]) -> HeadStatistics:
    """Of several batches, weighted by how many queries each has."""
    total = max(sum(count for _, count in found), 1)
    parts = zip(*(one for one, _ in found), strict=True)
    return HeadStatistics(
        *(sum(part * count for part, (_, count) in zip(of, found, strict=True)) / total for of in parts)
    )


class Change(NamedTuple):
    """`difference` of the mean of a metric, its 95 % interval, and `p` of no difference, two-sided."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    full: Float[ndarray, "items"], without: Float[ndarray, "items"], draws: int = DRAWS, random_state: int = 0
) -> Change:
    """What a model's metric loses or gains, items drawn again and again, the same of both.

    Args:
        full, without: of each item what it adds to the metric, before and behind.
        draws: how many.
        random_state: of them.

    >>> paired_bootstrap(np.ones(30), np.ones(30)).p
    1.0
    """
    require_at_least(1, draws=draws)
    if full.shape != without.shape or full.ndim != 1 or not len(full):
        raise InputError(
            f"without: expected {list(full.shape)} items as before, at least one, got {list(without.shape)}"
        )
    d = np.asarray(without, dtype=np.float64) - np.asarray(full, dtype=np.float64)
    rng = np.random.default_rng(random_state)
    even = np.full(len(d), 1 / len(d))
    parts = [rng.multinomial(len(d), even, size=min(AT_ONCE, draws - i)) @ d for i in range(0, draws, AT_ONCE)]
    means = np.concatenate(parts) / len(d)
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Change(float(d.mean()), float(low), float(high), float(min(1.0, 2 * max(tail, 1 / (draws + 1)))))


class Significant(NamedTuple):
    """Of single ablations: share with `p` below the level, and share of these that are better without their head."""

    share: float
    improving: float


def significant(changes: Sequence[Change], level: float = 0.01) -> Significant:
    """How many changes are none of chance, each for itself, as the paper counts.

    >>> significant([Change(-0.1, -0.2, -0.05, 0.001), Change(0.0, -0.1, 0.1, 0.9)])
    Significant(share=0.5, improving=0.0)
    """
    if not changes:
        raise InputError("changes: give at least one")
    found = [change for change in changes if change.p < level]
    improving = sum(change.difference > 0 for change in found) / len(found) if found else 0.0
    return Significant(len(found) / len(changes), improving)


def settled(checkpoints: Sequence[Float[Tensor, "heads"]]) -> tuple[float, ...]:
    """Rank correlation of what heads were worth at each checkpoint of a training with what they are worth at its end.

    >>> settled([torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])])
    (0.5, 1.0)
    """
    if not checkpoints or len({c.shape for c in checkpoints}) > 1:
        raise InputError("checkpoints: expected the importance of the same heads of each, at least one")
    last = checkpoints[-1].double().numpy()[:, None]
    one = np.ones((1, len(last)))
    return tuple(round(float(spearman(c.double().numpy()[:, None], last, one)[0]), 12) for c in checkpoints)
