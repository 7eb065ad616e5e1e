"""Sobol designs and indices: how much of the variance of an output each of its inputs has a share in.

Source: Fel et al., "CRAFT: Concept Recursive Activation FacTorization for Explainability" (2023), arXiv 2211.10154; Jansen
(1999), Homma and Saltelli (1996), Janon et al. (2014), Glen and Isaacs (2012), Saltelli et al. (2010) for the estimators.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of

Sampler = Literal["halton", "sobol", "latin hypercube"]
Estimator = Literal["jansen", "homma", "janon", "glen", "saltelli"]


def sobol_masks(
    concepts: int, points: int = 32, sampler: Sampler = "halton", seed: int = 0
) -> Float[Tensor, "designs concepts"]:
    """The replicated design `[A; B; C_1; ...; C_r]`, `points (r + 2)` rows in [0, 1]; `C_i` is A with column i of B.

    Args:
        concepts: r.
        points: rows of A, of B, and of each `C_i`.
        sampler: of `[A, B]`, in `2 r` dimensions; the sequences are not scrambled.
        seed: of the Latin hypercube.

    >>> sobol_masks(1, 2)
    tensor([[0.0000],
            [0.5000],
            [0.0000],
            [0.3333],
            [0.0000],
            [0.3333]])
    """
    from scipy.stats import qmc

    require_at_least(1, concepts=concepts, points=points)
    require_one_of(get_args(Sampler), sampler=sampler)
    if sampler == "sobol" and points & (points - 1):
        raise InputError(f"points: a Sobol sequence has a power of 2, got {points}")
    engines = {"halton": qmc.Halton, "sobol": qmc.Sobol}
    if sampler == "latin hypercube":
        drawn = qmc.LatinHypercube(2 * concepts, rng=seed).random(points)
    else:
        drawn = engines[sampler](2 * concepts, scramble=False).random(points)
    both = torch.as_tensor(drawn, dtype=torch.float32)
    a, b = both[:, :concepts], both[:, concepts:]
    own = torch.eye(concepts, dtype=torch.bool)[:, None, :]
    replaced = torch.where(own, b, a).reshape(-1, concepts)
    return torch.cat([a, b, replaced])


def total_indices(
    outputs: Float[Tensor, "*batch designs"], concepts: int, estimator: Estimator = "jansen"
) -> Float[Tensor, "*batch concepts"]:
    """Total Sobol indices from the outputs of a design; Jansen: `sum_n (y_A - y_Ci)^2 / (2 N V)`, V the variance of `y_A`.

    By Jansen's estimator a concept that the output does not depend on has exactly 0. An output that is the same throughout
    gives zeros.

    Args:
        outputs: of the rows of `sobol_masks`.
        concepts: r.
        estimator: `"jansen"`, `"homma"`, `"janon"`, `"glen"`, `"saltelli"`.

    >>> masks = sobol_masks(2, 64)
    >>> [round(v, 1) for v in total_indices(3 * masks[:, 0] + masks[:, 1], 2).tolist()]
    [0.9, 0.1]
    """
    require_one_of(get_args(Estimator), estimator=estimator)
    points, left = divmod(outputs.shape[-1], concepts + 2)
    if left or points < 2:
        raise InputError(
            f"outputs: expected N * {concepts + 2} of a design with N of 2 or more, got {outputs.shape[-1]}"
        )
    y = outputs.double().unflatten(-1, (concepts + 2, points))
    a, c = y[..., :1, :], y[..., 2:, :]
    variance = a.var(-1)
    found = _ESTIMATORS[estimator](a, c, variance)
    return torch.where(variance > 0, found, 0.0).to(outputs.dtype)


def _jansen(a: Tensor, c: Tensor, variance: Tensor) -> Tensor:
    return ((a - c) ** 2).mean(-1) / (2 * variance)


def _homma(a: Tensor, c: Tensor, variance: Tensor) -> Tensor:
    return (variance - (a * c).mean(-1) + a.mean(-1) ** 2) / variance


def _saltelli(a: Tensor, c: Tensor, variance: Tensor) -> Tensor:
    return 1 - ((a * c).mean(-1) - a.mean(-1) ** 2) / variance


def _janon(a: Tensor, c: Tensor, _variance: Tensor) -> Tensor:
    middle = ((a + c) / 2).mean(-1) ** 2
    return 1 - ((a * c).mean(-1) - middle) / (((a**2 + c**2) / 2).mean(-1) - middle)


def _glen(a: Tensor, c: Tensor, variance: Tensor) -> Tensor:
    together = ((a - a.mean(-1, keepdim=True)) * (c - c.mean(-1, keepdim=True))).sum(-1) / (a.shape[-1] - 1)
    return 1 - together / (variance * c.var(-1)).sqrt()


_ESTIMATORS = {"jansen": _jansen, "homma": _homma, "janon": _janon, "glen": _glen, "saltelli": _saltelli}
