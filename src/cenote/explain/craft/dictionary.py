"""Concepts of activations: a dictionary of directions, coefficients, and their gradients.

Source: Fel et al., "CRAFT: Concept Recursive Activation FacTorization for Explainability" (2023), arXiv 2211.10154.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of

Factoring = Literal["nmf", "k-means", "pca"]

SWEEPS = 2000
SETTLED = 1e-9
"""Largest change of a sweep over the largest coefficient, below which coefficients are those of the least squares."""


def require_activations(a: Float[Tensor, "items channels"]) -> None:
    """Raise `InputError` for negative activations, which no concepts that only add up can give back."""
    least = float(a.min()) if a.numel() else 0.0
    if not a.numel() or not bool(a.isfinite().all()):
        raise InputError(f"activations: expected finite ones of at least one item, got {list(a.shape)}")
    if least < 0:
        raise InputError(
            f"activations: the smallest is {least:.3g}, and concepts that add up need them at 0 or above; split the model "
            "behind a ReLU, as most ViTs have none, or take dictionary='k-means' or 'pca'"
        )


def dictionary(
    a: Float[Tensor, "items channels"], concepts: int, factoring: Factoring = "nmf", seed: int = 0
) -> tuple[Float[Tensor, "items concepts"], Float[Tensor, "concepts channels"]]:
    """Coefficients U and directions W with `a = U W` as near as may be.

    `"nmf"`: `min over U, W >= 0 of 1/2 ||a - U W||^2` by coordinate descent from NNDSVD; `"k-means"` (as ACE): centres, and
    one-hot coefficients; `"pca"`: the leading directions, signed.

    Args:
        a: activations.
        concepts: how many.
        factoring: see above.
        seed: of what each of them draws.

    Raises:
        InputError: for negative activations under `"nmf"`, or more concepts than items.
    """
    require_one_of(get_args(Factoring), factoring=factoring)
    require_at_least(1, concepts=concepts)
    if concepts > len(a):
        raise InputError(f"concepts: {concepts} of {len(a)} items; give more images, or fewer concepts")
    values = a.detach().cpu().numpy()
    if factoring == "nmf":
        require_activations(a)
        u, w = _nmf(values, concepts, seed)
    elif factoring == "k-means":
        from sklearn.cluster import KMeans

        found = KMeans(concepts, n_init=4, random_state=seed).fit(values)
        u, w = torch.nn.functional.one_hot(torch.as_tensor(found.labels_).long(), concepts), found.cluster_centers_
    else:
        _, _, right = torch.linalg.svd(a - a.mean(0), full_matrices=False)
        w = right[:concepts]
        u = a @ w.T
    return torch.as_tensor(u).to(a), torch.as_tensor(w).to(a)


def _nmf(values: object, concepts: int, seed: int) -> tuple[object, object]:
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    reducer = NMF(concepts, random_state=seed)
    with warnings.catch_warnings():
        # 200 sweeps are the method's own; how near they come is told by the error of reconstruction
        warnings.simplefilter("ignore", ConvergenceWarning)
        return reducer.fit_transform(values), reducer.components_


def coefficients(
    a: Float[Tensor, "*batch channels"], w: Float[Tensor, "concepts channels"]
) -> Float[Tensor, "*batch concepts"]:
    """Non-negative least squares with the directions fixed: `argmin over u >= 0 of ||a - u W||`, row by row.

    Coordinate descent on the Gram matrix, all rows at once, in float64.

    >>> w = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    >>> coefficients(torch.tensor([[2.0, -1.0, 2.0], [0.0, 1.0, 0.0]]), w).tolist()
    [[2.0, 0.0], [0.0, 0.5]]
    """
    if a.shape[-1] != w.shape[1]:
        raise InputError(f"activations: expected {w.shape[1]} channels as the concepts, got {a.shape[-1]}")
    rows = a.reshape(-1, a.shape[-1]).double()
    gram, target = w.double() @ w.double().T, rows @ w.double().T
    u = torch.zeros_like(target)
    live = [k for k in range(len(w)) if float(gram[k, k]) > 0]
    for _ in range(SWEEPS):
        before = u.clone()
        for k in live:
            u[:, k] = (u[:, k] + (target[:, k] - u @ gram[:, k]) / gram[k, k]).clamp(min=0)
        if float((u - before).abs().max()) <= SETTLED * max(float(u.abs().max()), 1e-30):
            break
    return u.view(*a.shape[:-1], len(w)).to(a.dtype)


def coefficient_gradient(
    u: Float[Tensor, "items concepts"], w: Float[Tensor, "concepts channels"], concept: int
) -> Float[Tensor, "items channels"]:
    """`d u_i / d a` of the least squares, by the implicit function theorem.

    On the active set `O = {k : u_k > 0}` of a row `u_O = (W_O W_O^T)^-1 W_O a`, and so
    `d u_O / d a = (W_O W_O^T)^-1 W_O`; 0 where the concept is not active.

    Args:
        u: coefficients of each row.
        w: directions.
        concept: i.
    """
    if not 0 <= concept < len(w):
        raise InputError(f"concept: expected 0 to {len(w) - 1}, got {concept}")
    found = torch.zeros(len(u), w.shape[1], dtype=u.dtype, device=u.device)
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for row, active in enumerate((u > 0).tolist()):
        if active[concept]:
            patterns.setdefault(tuple(active), []).append(row)
    for pattern, rows in patterns.items():
        own = w[torch.tensor(pattern, device=w.device)].double()
        at = sum(pattern[:concept])
        found[rows] = (torch.linalg.pinv(own @ own.T) @ own)[at].to(u.dtype)
    return found


def joint_gradient(
    a: Float[Tensor, "items channels"],
    u: Float[Tensor, "items concepts"],
    w: Float[Tensor, "concepts channels"],
    towards: Float[Tensor, "items concepts"],
) -> Float[Tensor, "items channels"]:
    """The gradient at `a` of `sum(towards * U(a))` where W follows `a` too: the factorisation's optimality conditions, solved.

    Where `F(U, W, a) = 0` collects, on the entries above zero, `(U W - a) W^T` and `U^T (U W - a)`, the gradient is
    `-towards dF/d(U, W)^+ dF/da`. `U S, S^-1 W` are as good for every positive diagonal S, so that the system is singular and
    is solved by least norm. Dense: for a few hundred entries of U and W.

    Args:
        a: activations that were factored.
        u, w: the factorisation, at an optimum.
        towards: weights of the entries of U.
    """
    active_u, active_w = (u > 0).flatten(), (w > 0).flatten()
    point = [x.detach().double() for x in (u, w, a)]

    def conditions(u: Tensor, w: Tensor, a: Tensor) -> Tensor:
        off = u @ w - a
        return torch.cat([(off @ w.T).flatten()[active_u], (u.T @ off).flatten()[active_w]])

    by_u, by_w, by_a = torch.autograd.functional.jacobian(conditions, tuple(point))
    system = torch.cat([by_u.flatten(1)[:, active_u], by_w.flatten(1)[:, active_w]], 1)
    weights = torch.cat([towards.double().flatten()[active_u], point[0].new_zeros(int(active_w.sum()))])
    solved = torch.linalg.pinv(system).T @ weights
    return -(solved @ by_a.flatten(1)).view(a.shape).to(a.dtype)


def matched(
    found: Float[Tensor, "concepts channels"], true: Float[Tensor, "planted channels"]
) -> Float[Tensor, "planted"]:
    """The cosine of each true direction with the one that an assignment gives it."""
    from scipy.optimize import linear_sum_assignment

    cosines = torch.nn.functional.cosine_similarity(true[:, None], found[None], dim=-1)
    rows, columns = linear_sum_assignment(-cosines.cpu().numpy())
    return cosines[torch.as_tensor(rows), torch.as_tensor(columns)]


def high(u: Float[Tensor, "crops concepts"], concept: int, percentile: float = 90.0) -> Bool[Tensor, "crops"]:
    """The crops whose coefficient lies above a percentile of all."""
    if not 0 <= percentile < 100:
        raise InputError(f"percentile: expected 0 to below 100, got {percentile}")
    return u[:, concept] > torch.quantile(u[:, concept], percentile / 100)
