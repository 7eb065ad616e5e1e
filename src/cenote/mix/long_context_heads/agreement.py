"""Whether heads that were told to be local were: against the oracle, and what was missed.

Source: Donhauser et al. (2025), arXiv 2502.09647.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.compare.metrics import auroc
from cenote.core.errors import InputError
from cenote.mix.long_context_heads.criterion import Masses


class Agreement(NamedTuple):
    """Of the queries and heads that have far keys.

    Attributes:
        auc: how often a query that the oracle calls local is scored above one that it does not; NaN where it calls all alike.
        log_error: median of how far the expected log mass of far keys is from the true one.
        false_local: of those that need far keys, the share that is told to be local.
        false_long: of those that are local, the share that is told to need far keys.
    """

    auc: float
    log_error: float
    false_local: float
    false_long: float


def agreement(exact: Masses, estimated: Masses, tau: float, among: Bool[Tensor, "*queries"] | None = None) -> Agreement:
    """How an estimate of far masses agrees with the true ones.

    Args:
        exact, estimated: of the same queries.
        tau: share from which a query is local.
        among: which queries count; those that have far keys by default.

    Raises:
        InputError: where none counts.
    """
    far = exact.far > float("-inf")
    among = far if among is None else among & far
    if not bool(among.any()):
        raise InputError("among: no query has far keys; give a longer text, or a smaller window")
    local, told = exact.local(tau)[among], estimated.local(tau)[among]
    score = (estimated.near - estimated.far)[among]
    return Agreement(
        score_auc(score, local),
        float((estimated.far - exact.far)[among].abs().median()),
        _share(told, ~local),
        _share(~told, local),
    )


def score_auc(scores: Float[Tensor, "queries"], local: Bool[Tensor, "queries"]) -> float:
    """How often a query that is local is scored above one that is not; ties count half.

    >>> import torch
    >>> score_auc(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([False, True, True]))
    1.0
    """
    if bool(local.all()) or not bool(local.any()):
        return float("nan")
    flat, labels = scores.double().cpu().numpy()[:, None], local.cpu().numpy().astype(int)
    return float(auroc(flat, labels, np.ones((1, len(labels))))[0])


def needle_misses(
    weights: Float[Tensor, "batch heads queries keys"],
    near: Bool[Tensor, "*_batch queries keys"],
    local: Bool[Tensor, "batch heads queries"],
    least: float = 0.5,
) -> Bool[Tensor, "batch heads queries"]:
    """Queries and heads that were told to be local though one far key has at least so much of their true attention.

    Args:
        weights: true ones.
        near: which keys are near.
        local: what was told.
        least: weight of a needle.
    """
    return local & (weights.masked_fill(near, 0.0).amax(-1) >= least)


def _share(part: Tensor, whole: Tensor) -> float:
    return float((part & whole).sum() / whole.sum()) if bool(whole.any()) else float("nan")
