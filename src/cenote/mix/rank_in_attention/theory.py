"""What random heads of rank 1 can do, for two points and one query on the sphere, and how points are drawn.

Source: Amsel, Yehudai and Bruna, "On the Benefits of Rank in Attention Layers" (2024), arXiv 2407.16153.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least


def head_gram(queries: Float[Tensor, "heads dim"], keys: Float[Tensor, "heads dim"]) -> Float[Tensor, "heads heads"]:
    """`C_ij = 1/2 + (2 / pi^2) asin(q_i . q_j) asin(k_i . k_j)`: what the outputs of two heads have in common in the mean.

    Args:
        queries, keys: of unit length; a head gives `x` of the larger `(k . x) (q . y)`.

    >>> q = torch.eye(2)
    >>> head_gram(q, q)
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    of_queries, of_keys = (arcsine(u @ u.mT) for u in (queries, keys))
    return 0.5 + 2 / math.pi**2 * of_queries * of_keys


def head_target(
    queries: Float[Tensor, "heads dim"], keys: Float[Tensor, "heads dim"], terms: int = 400
) -> Float[Tensor, "heads"]:
    """`b_i`: what a head's output has in common with the nearest point in the mean; of the angle between its query and key.

        b = 1/2 + (1 / pi) E_y[ asin(k . y) sign(q . y) ]

    In the plane in closed form; else as a series in Gegenbauer polynomials.

    Args:
        terms: of the series; its error falls as `1 / terms^2`.
    """
    require_at_least(1, terms=terms)
    dim = queries.shape[1]
    if dim < 2:
        raise InputError(f"queries: expected 2 dimensions or more, got {dim}")
    cosine = (queries * keys).sum(-1).clamp(-1, 1)
    if dim == 2:
        angle = cosine.acos()
        least = torch.minimum(angle, math.pi - angle)
        return 0.5 + torch.sign(math.pi / 2 - angle) * (0.25 - (least / math.pi).square())
    found = _series(dim, cosine.detach().double().cpu().numpy(), terms)
    return 0.5 + torch.from_numpy(found).to(queries) / math.pi


def optimal_weights(
    queries: Float[Tensor, "heads dim"], keys: Float[Tensor, "heads dim"], terms: int = 400
) -> tuple[Float[Tensor, "heads"], Float[Tensor, ""]]:
    """`a = C^-1 b`, and the error `1 - 2 a . b + a C a` that is expected of the heads' weighted sum."""
    gram, target = head_gram(queries, keys).double(), head_target(queries, keys, terms).double()
    a = torch.linalg.lstsq(gram, target.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    return a.to(queries), expected_error(a, gram, target).to(queries)


def expected_error(
    a: Float[Tensor, "heads"], gram: Float[Tensor, "heads heads"], target: Float[Tensor, "heads"]
) -> Float[Tensor, ""]:
    """`1 - 2 a . b + a C a`."""
    return 1 - 2 * a @ target + a @ gram @ a


def vote_is_right(angle: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """How probably a random head of rank 1 with q = k takes the nearer of two points, `angle` between their difference and y.

    >>> vote_is_right(torch.tensor([0.0, torch.pi / 2])).tolist()
    [1.0, 0.5]
    """
    return 1 - angle.cos().abs().clamp(max=1).acos() / math.pi


def arcsine(x: Tensor) -> Tensor:
    """Of what rounding may have left outside of [-1, 1]."""
    return x.clamp(-1, 1).asin()


def _series(dim: int, cosine: np.ndarray, terms: int) -> np.ndarray:
    """`E_y[asin(k . y) sign(q . y)] = sum_n a_n b_n N_n P_n(k . q)`, n odd, by quadrature over the half sphere."""
    from scipy.special import gammaln, roots_legendre

    nodes, weights = roots_legendre(4 * terms + 64)
    theta = (nodes + 1) * math.pi / 4
    t, density = np.cos(theta), weights * np.sin(theta) ** (dim - 2)
    density = density / density.sum()
    log_count = _log_dimensions(dim, 2 * terms, gammaln)
    total = np.zeros_like(cosine)
    # of unit norm at the nodes, of value 1 at 1 for the answer: neither overflows
    before, now = np.ones_like(t), t * math.exp(log_count[1] / 2)
    p_before, p_now = np.ones_like(cosine), cosine.copy()
    for n in range(1, 2 * terms):
        if n % 2:
            total += (density * (math.pi / 2 - theta) * now).sum() * (density * now).sum() * p_now
        up, down = (math.exp((log_count[n + 1] - log_count[m]) / 2) for m in (n, n - 1))
        before, now = now, (up * (2 * n + dim - 2) * t * now - down * n * before) / (n + dim - 2)
        p_before, p_now = p_now, ((2 * n + dim - 2) * cosine * p_now - n * p_before) / (n + dim - 2)
    return total


def _log_dimensions(dim: int, most: int, gammaln: object) -> np.ndarray:
    """Logarithm of how many harmonics of each degree there are."""
    n = np.arange(1, most + 1)
    log = np.log(2 * n + dim - 2) + gammaln(n + dim - 2) - gammaln(n + 1) - gammaln(dim - 1)  # type: ignore[operator]
    return np.concatenate([[0.0], log])
