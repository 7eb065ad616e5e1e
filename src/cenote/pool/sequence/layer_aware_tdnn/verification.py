"""Is it the same speaker? Enrolment, the scores of trials, the threshold that decides, and how often it errs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.compare.intervals import of_draws
from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least

RESAMPLES = 1000


class EqualErrors(NamedTuple):
    """Where a verifier errs as often one way as the other.

    Attributes:
        rate: share of the trials of one speaker that are refused, and of two speakers that are accepted.
        threshold: trials that score as much or more are accepted; take it from trials other than those that are tested.
        low, high: interval of the rate, 95 %, over draws of the trials.
    """

    rate: float
    threshold: float
    low: float
    high: float


def enrolled(clips: Float[Tensor, "clips heads slice"]) -> Float[Tensor, "heads slice"]:
    """A speaker of several clips: the direction of the mean of their embeddings.

    Args:
        clips: of one speaker, as `LayerAwareTDNN.embed` gives them.

    Raises:
        InputError: where there is no clip.

    >>> enrolled(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).square().tolist()[0][0] > 0.49
    True
    """
    if len(clips) == 0:
        raise InputError("clips: a speaker is enrolled with one clip at least, got none")
    return F.normalize(F.normalize(clips, dim=-1).mean(0), dim=-1)


def trial_scores(
    first: Float[Tensor, "trials heads slice"], second: Float[Tensor, "trials heads slice"]
) -> Float[Tensor, "trials"]:
    """The cosine of both sides of each trial, mean over the heads of the embedding.

    Args:
        first, second: clips or enrolled speakers; `expand` one speaker to as many trials.

    Raises:
        InputError: where the shapes differ.

    >>> trial_scores(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[3.0, 0.0]]])).tolist()
    [1.0]
    """
    if first.dim() != 3 or first.shape != second.shape:
        raise InputError(
            f"first, second: expected [trials, heads, slice] of one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return F.cosine_similarity(first, second, dim=-1).mean(-1)


def equal_errors(scores: Float[Tensor, "trials"], same: Bool[Tensor, "trials"], seed: int = 0) -> EqualErrors:
    """The equal error rate over trials, its threshold, and an interval by resampling trials of either kind.

    Between two thresholds the rate is interpolated.

    Args:
        scores: of the trials; the higher, the more alike.
        same: True where both sides are one speaker.
        seed: of the draws.

    Raises:
        InputError: where a kind of trials is missing, or a score is not finite.

    >>> equal_errors(torch.tensor([0.9, 0.4, 0.6, 0.1]), torch.tensor([True, True, False, False])).rate
    0.5
    """
    own, other = _kinds(scores, same)
    rate, threshold = _equal(own, other)
    rng = np.random.default_rng(seed)
    drawn = [_equal(rng.choice(own, len(own)), rng.choice(other, len(other)))[0] for _ in range(RESAMPLES)]
    return EqualErrors(rate, threshold, *of_draws(np.asarray(drawn)))


def min_detection_cost(
    scores: Float[Tensor, "trials"],
    same: Bool[Tensor, "trials"],
    prior: float = 0.01,
    miss: float = 1.0,
    false_alarm: float = 1.0,
) -> float:
    """The least cost of any threshold, over that of answering always the same: `minDCF`.

    `min_t (C_m P p_miss(t) + C_f (1 - P) p_false(t)) / min(C_m P, C_f (1 - P))`.

    Args:
        scores, same: as of `equal_errors`.
        prior: `P`, how often a trial is of one speaker.
        miss, false_alarm: `C_m`, `C_f`, what either error costs.

    Raises:
        InputError: as of `equal_errors`, or where `prior` is no share between 0 and 1 or a cost not positive.

    >>> min_detection_cost(torch.tensor([0.9, 0.4, 0.6, 0.1]), torch.tensor([True, True, False, False]))
    0.5
    """
    if not 0 < prior < 1 or miss <= 0 or false_alarm <= 0:
        raise InputError(
            f"prior, miss, false_alarm: expected a share between 0 and 1 and positive costs, got {prior}, {miss}, {false_alarm}"
        )
    missed, falsely, _ = _errors(*_kinds(scores, same))
    cost = miss * prior * missed + false_alarm * (1 - prior) * falsely
    return float(cost.min() / min(miss * prior, false_alarm * (1 - prior)))


def _kinds(scores: Tensor, same: Tensor) -> tuple[Float[np.ndarray, "own"], Float[np.ndarray, "other"]]:
    if scores.dim() != 1 or scores.shape != same.shape:
        raise InputError(
            f"scores, same: expected one of each per trial, got {tuple(scores.shape)} and {tuple(same.shape)}"
        )
    if not bool(scores.isfinite().all()):
        raise InputError("scores: expected finite numbers; look at the embeddings of the clips")
    require_at_least(1, trials_of_one_speaker=int(same.sum()), trials_of_two_speakers=int((~same).sum()))
    values = scores.detach().cpu().double().numpy()
    marks = same.cpu().numpy()
    return values[marks], values[~marks]


def _errors(
    own: Float[np.ndarray, "own"], other: Float[np.ndarray, "other"]
) -> tuple[Float[np.ndarray, "at"], Float[np.ndarray, "at"], Float[np.ndarray, "at"]]:
    """Shares missed and falsely accepted at each score as a threshold, and at one above all of them."""
    at = np.append(np.unique(np.concatenate([own, other])), np.inf)
    missed = np.searchsorted(np.sort(own), at) / len(own)
    return missed, 1 - np.searchsorted(np.sort(other), at) / len(other), at


def _equal(own: Float[np.ndarray, "own"], other: Float[np.ndarray, "other"]) -> tuple[float, float]:
    missed, falsely, at = _errors(own, other)
    # the shares missed rise from 0 and those falsely accepted fall to 0, so that they cross
    after = int(np.argmax(missed >= falsely))
    before = max(after - 1, 0)
    gap = falsely[before] - missed[before]
    closed = gap - (falsely[after] - missed[after])
    rate = missed[before] + (gap / closed if closed else 0.0) * (missed[after] - missed[before])
    nearest = min(before, after, key=lambda i: abs(missed[i] - falsely[i]))
    return float(rate), float(at[nearest])
