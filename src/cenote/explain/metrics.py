"""How faithful an explanation is: plain functions, a number per item.

Units are taken away in the order of their scores, and the model is asked again (`cenote.core.perturb`): `p` is the output that
is explained, a probability, before and after.

Source: DeYoung et al., "ERASER", ACL 2020 (comprehensiveness, sufficiency); Samek et al., IEEE TNNLS 2017, and Petsiuk et al.,
"RISE", BMVC 2018 (deletion, insertion); Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019;
Hurley and Rickard, "Comparing Measures of Sparsity", IEEE TIT 2009 (the Gini index).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.redrawn import rank_correlation

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Of the units, at which ERASER takes away or keeps."""


def ranked(scores: Float[Tensor, "items units"], real: Bool[Tensor, "items units"]) -> Int[Tensor, "items units"]:
    """The rank of each unit, 0 = the largest score; first ones first among equals, padding behind all.

    >>> ranked(torch.tensor([[0.1, 0.7, 0.7, 0.0]]), torch.tensor([[True, True, True, False]])).tolist()
    [[2, 0, 1, 3]]
    """
    order = scores.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def counted(real: Bool[Tensor, "items units"], shares: Sequence[float] = SHARES) -> Int[Tensor, "items shares"]:
    """How many units a share of them is: one at least, as half a unit cannot be taken away.

    >>> counted(torch.ones(1, 8, dtype=torch.bool)).tolist()
    [[1, 1, 1, 2, 4]]
    """
    # 0.1 * 10 is not to be 2 units for want of a bit
    exact = real.sum(1, keepdim=True).double() * torch.tensor(shares, dtype=torch.float64, device=real.device)
    return (exact - 1e-9).ceil().long().clamp(min=1).minimum(real.sum(1, keepdim=True))


def without_top(
    scores: Float[Tensor, "items units"], real: Bool[Tensor, "items units"], shares: Sequence[float] = SHARES
) -> Bool[Tensor, "items shares units"]:
    """What stays where the units with the largest scores are taken away, for each share."""
    return ranked(scores, real)[:, None] >= counted(real, shares)[..., None]


def only_top(
    scores: Float[Tensor, "items units"], real: Bool[Tensor, "items units"], shares: Sequence[float] = SHARES
) -> Bool[Tensor, "items shares units"]:
    """What stays where only the units with the largest scores are kept, for each share."""
    return ~without_top(scores, real, shares) & real[:, None]


def comprehensiveness(whole: Float[Tensor, "items"], without: Float[Tensor, "items shares"]) -> Float[Tensor, "items"]:
    """`mean_k p(x) - p(x without its top k)`: by how much the output falls. Higher is better.

    >>> round(float(comprehensiveness(torch.tensor([0.9]), torch.tensor([[0.5, 0.3]]))), 6)
    0.5
    """
    return (whole[:, None] - without).mean(1)


def sufficiency(whole: Float[Tensor, "items"], only: Float[Tensor, "items shares"]) -> Float[Tensor, "items"]:
    """`mean_k p(x) - p(only the top k of x)`: by how much it falls all the same. Lower is better."""
    return (whole[:, None] - only).mean(1)


def area(values: Float[Tensor, "items points"], at: Sequence[float]) -> Float[Tensor, "items"]:
    """Below a curve over the share of units that is taken away (deletion) or kept (insertion), by the rule of trapezes.

    Args:
        values: outputs.
        at: the shares, rising.

    >>> area(torch.tensor([[1.0, 0.0, 0.0]]), (0.0, 0.5, 1.0)).tolist()
    [0.25]
    """
    if len(at) != values.shape[1] or list(at) != sorted(at):
        raise InputError(f"at: expected {values.shape[1]} rising shares, got {list(at)}")
    return torch.trapezoid(values, torch.tensor(at, dtype=values.dtype, device=values.device))


def infidelity(
    scores: Float[Tensor, "items units"], keep: Bool[Tensor, "items masks units"], fall: Float[Tensor, "items masks"]
) -> Float[Tensor, "items"]:
    """`E (b I . s - fall)^2 / E fall^2` with the best factor b: how badly scores predict what taking units away does.

    0 where the sum of what was taken away tells the fall, 1 where it tells nothing. Scores in other units than the output's
    are not punished: that is the factor's doing.

    Args:
        scores: signed where the explanation is.
        keep: random masks, True = stays.
        fall: of the output under each.

    >>> keep = torch.tensor([[[True, False], [False, True]]])
    >>> infidelity(torch.tensor([[2.0, 4.0]]), keep, torch.tensor([[0.2, 0.1]])).tolist()
    [0.0]
    """
    told = ((~keep).to(scores.dtype) * scores[:, None]).sum(2)
    best = (told * fall).sum(1) / told.square().sum(1).clamp(min=torch.finfo(told.dtype).tiny)
    left = (best.clamp(min=0)[:, None] * told - fall).square().mean(1)
    return left / fall.square().mean(1).clamp(min=1e-12)


def sparsity(scores: Float[Tensor, "items units"], real: Bool[Tensor, "items units"]) -> Float[Tensor, "items"]:
    """The Gini index of absolute scores: 0 where all units share alike, near 1 where one has all.

    >>> scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 3.0]])
    >>> sparsity(scores, torch.ones(2, 4, dtype=torch.bool)).tolist()
    [0.0, 0.75]
    """
    found = []
    for values, there in zip(scores.abs().double(), real, strict=True):
        own = values[there].sort().values
        n, total = len(own), own.sum()
        # of the smallest most
        share = (n - torch.arange(1, n + 1, device=own.device) + 0.5) / max(n, 1)
        found.append(1 - 2 * (own * share).sum() / total if n and total > 0 else own.new_zeros(()))
    return torch.stack(found).to(scores.dtype)


def agreement(
    a: Float[Tensor, "items units"], b: Float[Tensor, "items units"], real: Bool[Tensor, "items units"]
) -> Float[Tensor, "items"]:
    """Spearman's correlation of two explanations of each item; 0 where one of them scores all units alike.

    >>> there = torch.ones(1, 3, dtype=torch.bool)
    >>> agreement(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]]), there).tolist()
    [-1.0]
    """
    pairs = zip(a, b, real, strict=True)
    return torch.tensor([rank_correlation(x[there], y[there]) for x, y, there in pairs], device=a.device)


def top_overlap(
    a: Float[Tensor, "items units"],
    b: Float[Tensor, "items units"],
    real: Bool[Tensor, "items units"],
    share: float = 0.2,
) -> Float[Tensor, "items"]:
    """Which part of the largest units two explanations share.

    >>> there = torch.ones(1, 4, dtype=torch.bool)
    >>> top_overlap(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]]), there, 0.5).tolist()
    [0.5]
    """
    first, second = (only_top(scores, real, (share,))[:, 0] for scores in (a, b))
    return (first & second).sum(1) / first.sum(1).clamp(min=1)


def pointing(
    scores: Float[Tensor, "items units"], inside: Float[Tensor, "items units"], real: Bool[Tensor, "items units"]
) -> Float[Tensor, "items"]:
    """The pointing game: 1 where the unit with the largest score touches the mask, 0 elsewhere.

    Args:
        scores: of units; the first of equal ones counts.
        inside: which share of each unit the mask covers.
        real: which units there are.

    >>> there = torch.ones(1, 3, dtype=torch.bool)
    >>> pointing(torch.tensor([[0.1, 0.9, 0.0]]), torch.tensor([[1.0, 0.2, 0.0]]), there).tolist()
    [1.0]
    """
    first = ranked(scores, real) == 0
    return ((inside > 0) & first).any(1).to(scores.dtype)


def mass_inside(
    scores: Float[Tensor, "items units"], inside: Float[Tensor, "items units"], real: Bool[Tensor, "items units"]
) -> Float[Tensor, "items"]:
    """`sum_i max(s_i, 0) m_i / sum_i max(s_i, 0)`: which part of what speaks for the target lies in the mask; 0 of no such.

    >>> there = torch.ones(1, 3, dtype=torch.bool)
    >>> mass_inside(torch.tensor([[3.0, 1.0, -5.0]]), torch.tensor([[1.0, 0.0, 1.0]]), there).tolist()
    [0.75]
    """
    for_it = (scores * real).clamp(min=0)
    return (for_it * inside).sum(1) / for_it.sum(1).clamp(min=torch.finfo(scores.dtype).tiny)


def matched_iou(
    scores: Float[Tensor, "items units"], inside: Float[Tensor, "items units"], real: Bool[Tensor, "items units"]
) -> Float[Tensor, "items"]:
    """Intersection over union of the mask and as many units with the largest scores as it is large, one at least.

    >>> there = torch.ones(1, 4, dtype=torch.bool)
    >>> matched_iou(torch.tensor([[0.9, 0.8, 0.1, 0.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]]), there).tolist()
    [0.3333333432674408]
    """
    covered = (inside * real).sum(1)
    count = covered.round().clamp(min=1)
    taken = (ranked(scores, real) < count[:, None]) & real
    both = (inside * taken).sum(1)
    return both / (taken.sum(1) + covered - both)
