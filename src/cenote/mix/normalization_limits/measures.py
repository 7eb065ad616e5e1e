"""What a row of attention weights and the vectors that it mixes say of each other, with bounds.

Formulas that could not be read in the paper are derived here, and say so.

Source: Mudarisov, Burtsev, Petrova and State, "Limitations of Normalization in Attention Mechanism" (2025), arXiv 2508.17821.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.mix.base import Normaliser

Mode = Literal["sum", "aggregate"]
Weights = Float[Tensor, "*rows tokens"]
Vectors = Float[Tensor, "*#rows tokens dim"]
Real = Bool[Tensor, "*#rows tokens"]


class Separable(NamedTuple):
    """How many of the top tokens lie within the radius at which the nearest other token lies.

    Attributes:
        radius: `r = min_{j outside} |s - a_j x_j|`.
        inside: `N_s`, of the top tokens those with `|a_i x_i - s| <= r`.
        share: `N_s / N`; NaN where no token is outside, or none inside.
        spread: `xi_i = M sqrt(sum_{k in I, k != i} a_k^2)`, M the largest norm: how far a top token lies from the sum, were
            their directions independent (inferred); 0 outside of the top.
        by_markov, by_chebyshev: `1 - mean_i xi_i / r`, `1 - mean_i xi_i^2 / r^2`: lower bounds of the expected share under
            independent directions (inferred). The constants of the paper's upper bound were not recovered.
    """

    radius: Float[Tensor, "*rows"]
    inside: Float[Tensor, "*rows"]
    share: Float[Tensor, "*rows"]
    spread: Float[Tensor, "*rows tokens"]
    by_markov: Float[Tensor, "*rows"]
    by_chebyshev: Float[Tensor, "*rows"]


class JacobianNorms(NamedTuple):
    """Of `J = (diag(a) - a a^T) / T`, the softmax's Jacobian; that of another normaliser is another, see `spectral_norms`.

    Attributes:
        entry, spectral, frobenius: largest entry, spectral and Frobenius norm.
        claimed: `min(1 / (4 T), sqrt 2)`, as the paper is reported to bound the norm: the spectral norm may be twice as large.
        entry_bound, spectral_bound: `1 / (4 T)` and `1 / (2 T)`, which hold of weights that sum to 1, and are reached.
    """

    entry: Float[Tensor, "*rows"]
    spectral: Float[Tensor, "*rows"]
    frobenius: Float[Tensor, "*rows"]
    claimed: float
    entry_bound: float
    spectral_bound: float


def top_set(weights: Weights, n: int, mask: Real | None = None) -> Bool[Tensor, "*rows tokens"]:
    """The n largest weights of each row, the lowest index of equal ones; all where there are fewer.

    >>> top_set(torch.tensor([0.2, 0.4, 0.2, 0.2]), 2).tolist()
    [True, True, False, False]
    """
    require_at_least(0, n=n)
    held = weights if mask is None else weights.masked_fill(~mask, -math.inf)
    order = held.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(weights.shape[-1], device=weights.device).expand_as(order)
    found = torch.zeros_like(order).scatter(-1, order, rank) < n
    return found if mask is None else found & mask


def distances(weights: Weights, x: Vectors, selected: Bool[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows tokens"]:
    """`|s - a_j x_j|` of every token, `s = sum_{i selected} a_i x_i`, in float64; no `[rows, tokens, dim]` tensor is made."""
    weights, x = weights.double(), x.double()
    s = _sums(weights * selected, x)
    squared = s.square().sum(-1, keepdim=True) + weights.square() * x.square().sum(-1) - 2 * weights * _products(s, x)
    return squared.clamp(min=0.0).sqrt()


def distance(
    weights: Weights,
    x: Vectors,
    n: int,
    mask: Real | None = None,
    mode: Mode = "sum",
    selected: Bool[Tensor, "*rows tokens"] | None = None,
) -> Float[Tensor, "*rows"]:
    """`sum_{j outside} |s - a_j x_j|`, s the sum of the n largest `a_i x_i`, not made to weigh 1.

    Args:
        weights: rows of attention.
        x: what they mix: values, or embeddings.
        n: how many are selected; with none or all of them the distance is 0.
        mask: True = a token of the row; of a causal row those that it may read.
        mode: `"aggregate"`: the norm of the sum in place of the sum of norms.
        selected: another set than the largest.
    """
    require_one_of(get_args(Mode), mode=mode)
    weights, x = _cleared(weights, x, mask)
    chosen = top_set(weights, n, mask) if selected is None else selected
    outside = _outside(chosen, mask)
    if mode == "sum":
        # with nothing selected there is nothing to be far from
        return (distances(weights, x, chosen) * outside).sum(-1) * chosen.any(-1)
    weights, x = weights.double(), x.double()
    s, others = _sums(weights * chosen, x), _sums(weights * outside, x)
    return (outside.sum(-1, keepdim=True) * s - others).norm(dim=-1) * chosen.any(-1)


def distance_bound(weights: Weights, x: Vectors, n: int, mask: Real | None = None) -> Float[Tensor, "*rows"]:
    """`B d_1 + (sum_{j outside} |1 - a_j|) A max_{i selected} |x_i|`, `d_1 = max_{j outside} |s - x_j|`.

    A is the selected mass and B that outside, both of absolute weights; where weights sum to 1 it is
    `(1 - A) d_1 + (L - N - 1 + A) A max_{i selected} |x_i|`. The formula is reconstructed; it follows from
    `s - a x = a (s - x) + (1 - a) s`, for any weights.
    """
    weights, x = _cleared(weights, x, mask)
    chosen = top_set(weights, n, mask)
    outside = _outside(chosen, mask)
    weights = weights.double()
    s = _sums(weights * chosen, x.double())
    norms = x.double().square().sum(-1)
    away = (s.square().sum(-1, keepdim=True) + norms - 2 * _products(s, x.double())).clamp(min=0.0).sqrt()
    farthest = away.masked_fill(~outside, 0.0).amax(-1)
    largest = norms.sqrt().expand(chosen.shape).masked_fill(~chosen, 0.0).amax(-1)
    inside, beside = ((weights.abs() * those).sum(-1) for those in (chosen, outside))
    short = ((1 - weights).abs() * outside).sum(-1)
    return (beside * farthest + short * inside * largest) * (outside.any(-1) & chosen.any(-1))


def expected_squared_distances(
    weights: Weights, x: Vectors, n: int, mask: Real | None = None
) -> Float[Tensor, "*rows tokens"]:
    """`E |s - y_j|^2` of a uniform set of n of the others, `y = a x`: exact, derived here.

        p_1 Q_j + p_2 (|S_j|^2 - Q_j) - 2 p_1 S_j . y_j + |y_j|^2,   p_1 = n / (L - 1),   p_2 = n (n - 1) / ((L - 1) (L - 2)),

    S_j the sum and Q_j the sum of squared norms of all y but y_j; 0 where the mask is False.

    Raises:
        InputError: where a row has fewer than n + 1 tokens.
    """
    real = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand_as(weights)
    length = real.sum(-1, keepdim=True).double()
    if bool((length < n + 1).any()):
        raise InputError(f"n: {n} of the others, and a row has {int(length.min())} tokens")
    weights, x = _cleared(weights.double(), x.double(), mask)
    squared = weights.square() * x.square().sum(-1)
    total = _sums(weights, x)
    own = weights * _products(total, x)
    # S_j = S - y_j
    sums = total.square().sum(-1, keepdim=True) - 2 * own + squared
    norms = squared.sum(-1, keepdim=True) - squared
    p1 = n / (length - 1).clamp(min=1)
    p2 = n * (n - 1) / ((length - 1) * (length - 2)).clamp(min=1)
    found = p1 * norms + p2 * (sums - norms) - 2 * p1 * (own - squared) + squared
    return found.clamp(min=0.0) * real


def expected_distance_bound(weights: Weights, x: Vectors, n: int, mask: Real | None = None) -> Float[Tensor, "*rows"]:
    """`(L - N) / L sum_j sqrt(E |s - y_j|^2)`: not less than the distance that is expected of a uniform set of n tokens."""
    found = expected_squared_distances(weights, x, n, mask)
    if mask is None:
        return (weights.shape[-1] - n) / weights.shape[-1] * found.sqrt().sum(-1)
    # a root has no gradient at 0
    roots = found.masked_fill(~mask, 1.0).sqrt().masked_fill(~mask, 0.0)
    length = mask.expand_as(weights).sum(-1)
    return (length - n) / length * roots.sum(-1)


def softmax_range(spread: float, length: int, temperature: float = 1.0) -> tuple[float, float]:
    """Between what all weights lie, `exp(-2 D / T) / L` and `exp(2 D / T) / L`, where logits lie in [-D, D].

    Args:
        spread: D; of unscaled products the largest |q| times the largest |k|.
    """
    require_positive(temperature=temperature)
    require_at_least(1, length=length)
    swing = 2 * spread / temperature
    # e^709 is the largest power that a float holds
    return math.exp(-swing) / length, math.exp(swing) / length if swing < 709 else math.inf


def vanishing_range(
    function: Callable[[Tensor], Tensor], spread: float, length: int, steps: int = 2001
) -> tuple[float, float]:
    """`C / L` and `1 / (C L)`, `C = min F / max F` over [-a, a]: between what the weights `F(l) / sum F(l)` lie (Lemma 1).

    Args:
        function: F, positive; looked at in `steps` places.
        spread: a.
        length: L.

    >>> vanishing_range(torch.exp, 0.0, 4)
    (0.25, 0.25)
    """
    require_at_least(1, length=length)
    found = function(torch.linspace(-spread, spread, steps, dtype=torch.float64))
    least, most = float(found.min()), float(found.max())
    if not least > 0:
        raise InputError(f"function: expected positive values over [-{spread:g}, {spread:g}], got {least:g}")
    return least / most / length, most / least / length


def separable(weights: Weights, x: Vectors, n: int, mask: Real | None = None) -> Separable:
    """How many of the n top tokens can be told from the others by their place."""
    weights, x = _cleared(weights, x, mask)
    chosen = top_set(weights, n, mask)
    outside = _outside(chosen, mask)
    away = distances(weights, x, chosen)
    radius = away.masked_fill(~outside, math.inf).amin(-1)
    count = ((away <= radius.unsqueeze(-1)) & chosen).sum(-1).double()
    inside = chosen.sum(-1)
    known = (inside > 0) & outside.any(-1)
    squared = weights.double().square() * chosen
    largest = x.double().norm(dim=-1).expand(chosen.shape).masked_fill(~(chosen | outside), 0.0).amax(-1, keepdim=True)
    spread = largest * (squared.sum(-1, keepdim=True) - squared).clamp(min=0.0).sqrt() * chosen
    safe = torch.where(known, inside, 1)
    lower = [1 - spread.pow(p).sum(-1) / safe / radius.pow(p) for p in (1, 2)]
    unknown = torch.full_like(radius, math.nan)
    return Separable(
        radius,
        count,
        torch.where(known, count / safe, unknown),
        spread,
        torch.where(known, lower[0], unknown),
        torch.where(known, lower[1], unknown),
    )


def softmax_jacobian(weights: Weights, temperature: float = 1.0) -> Float[Tensor, "*rows tokens tokens"]:
    """`(diag(a) - a a^T) / T`."""
    require_positive(temperature=temperature)
    return (torch.diag_embed(weights) - weights.unsqueeze(-1) * weights.unsqueeze(-2)) / temperature


def jacobian_norms(weights: Weights, temperature: float = 1.0) -> JacobianNorms:
    """Norms of the softmax's Jacobian, from the weights alone: no `[tokens, tokens]` tensor is made.

    Eigenvalues are the roots of `1 = sum_i a_i^2 / (a_i - t)`: the largest lies between the two largest weights, and where
    weights sum to more than 1 one is negative.

    >>> found = jacobian_norms(torch.tensor([0.5, 0.5]))
    >>> round(float(found.spectral), 6), found.claimed, found.spectral_bound
    (0.5, 0.25, 0.5)
    """
    require_positive(temperature=temperature)
    a = weights.double()
    spectral = torch.maximum(_largest_eigenvalue(a), -_negative_eigenvalue(a)) / temperature
    squares = a.square()
    frobenius = (squares.sum(-1) - 2 * (squares * a).sum(-1) + squares.sum(-1).square()).clamp(min=0.0).sqrt()
    diagonal = (a - squares).abs().amax(-1)
    if a.shape[-1] > 1:
        first, second = a.topk(2, -1).values.unbind(-1)
        diagonal = torch.maximum(diagonal, first * second)
    quarter = 1 / (4 * temperature)
    return JacobianNorms(
        diagonal / temperature,
        spectral,
        frobenius / temperature,
        min(quarter, math.sqrt(2)),
        quarter,
        1 / (2 * temperature),
    )


def jacobian_of(normaliser: Normaliser, logits: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens tokens"]:
    """That of any normaliser, by automatic differentiation."""
    return torch.autograd.functional.jacobian(normaliser, logits)


def spectral_norms(
    normaliser: Normaliser, logits: Float[Tensor, "*rows tokens"], mask: Real | None = None
) -> Float[Tensor, "*rows"]:
    """Of each row's Jacobian, in float64, by automatic differentiation: a straight-through normaliser has that of what it
    passes.

    Args:
        normaliser: reads each row for itself.
        logits: anything where the mask is False.
        mask: True = a token of the row.

    >>> from cenote.mix.normalisers import normaliser
    >>> spectral_norms(normaliser("sigmoid"), torch.zeros(3)).item()
    0.25
    """
    real = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand_as(logits)
    with torch.enable_grad():
        held = logits.detach().double().masked_fill(~real, 0.0).requires_grad_()
        weights = normaliser(held, real)
        if not weights.requires_grad:
            return weights.new_zeros(weights.shape[:-1])
        # rows do not see each other, so that one pass gives this line of the Jacobians of all
        lines = [torch.autograd.grad(w.sum(), held, retain_graph=True)[0] for w in weights.unbind(-1)]
    return torch.linalg.matrix_norm(torch.stack(lines, -2), 2)


def entropy(weights: Weights) -> Float[Tensor, "*rows"]:
    """In nats; of weights that sum to 1."""
    return -torch.special.xlogy(weights.double(), weights.double()).sum(-1)


def critical_n(
    weights: Float[Tensor, "rows tokens"],
    x: Float[Tensor, "rows tokens dim"] | Float[Tensor, "tokens dim"],
    candidates: Sequence[int] | None = None,
    level: float = 0.01,
    generator: torch.Generator | None = None,
) -> int | None:
    """The smallest N at which the distances of top sets and those of random sets cannot be told apart.

    Told apart is what a two-sample Kolmogorov-Smirnov test says of one distance per row: of its top set, and of a uniform one.
    The distances of one row's tokens are no sample: all of them hang on the same sum.

    Args:
        weights: of rows that read the same number of tokens; at some twenty of them the test can say anything.
        candidates: N in the order in which they are tried; all by default.
        level: of the test.

    Returns:
        None where every N can be told apart.
    """
    from scipy.stats import ks_2samp

    length = weights.shape[-1]
    for n in range(1, length) if candidates is None else candidates:
        if not 0 < n < length:
            raise InputError(f"candidates: expected 1 to {length - 1} of {length} tokens, got {n}")
        noise = torch.rand(weights.shape, generator=generator)
        drawn = top_set(noise.to(weights.device), n)
        pair = (distance(weights, x, n), distance(weights, x, n, selected=drawn))
        if ks_2samp(*(d.detach().cpu().numpy() for d in pair)).pvalue >= level:
            return n
    return None


def permuted(weights: Weights, mask: Real | None = None, generator: torch.Generator | None = None) -> Weights:
    """The same weights at other tokens of their row: what a measure still says then does not hang on which tokens they are."""
    noise = torch.rand(weights.shape, generator=generator, device=weights.device)
    real = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.expand_as(weights)
    # real tokens in their order, and in a drawn one
    order = (~real).to(torch.uint8).argsort(dim=-1, stable=True)
    drawn = noise.masked_fill(~real, 2.0).argsort(dim=-1)
    return torch.zeros_like(weights).scatter(-1, drawn, weights.gather(-1, order)).masked_fill(~real, 0.0)


def _cleared(weights: Weights, x: Vectors, mask: Real | None) -> tuple[Weights, Vectors]:
    """Zeros where a row may not read, and in vectors that no row may read."""
    if mask is None:
        return weights, x
    shape = x.shape[:-1]
    read = mask.expand(torch.broadcast_shapes(mask.shape, shape)).long().sum_to_size(shape) > 0
    return weights.masked_fill(~mask, 0.0), cleared(x, read)


def _sums(weights: Weights, x: Vectors) -> Float[Tensor, "*rows dim"]:
    """`sum_j w_j x_j`; vectors that are the same for all rows are not copied for each."""
    if x.dim() == 2:
        return weights @ x
    return weights @ x.squeeze(-3) if x.shape[-3] == 1 else (weights.unsqueeze(-2) @ x).squeeze(-2)


def _products(s: Float[Tensor, "*rows dim"], x: Vectors) -> Float[Tensor, "*rows tokens"]:
    """`s . x_j`."""
    return _sums(s, x.mT)


def _outside(chosen: Tensor, mask: Tensor | None) -> Bool[Tensor, "*rows tokens"]:
    return ~chosen if mask is None else ~chosen & mask


def _largest_eigenvalue(a: Tensor) -> Float[Tensor, "*rows"]:
    """Of `diag(a) - a a^T`."""
    if a.shape[-1] == 1:
        return (a - a.square()).squeeze(-1)
    high, low = a.topk(2, -1).values.unbind(-1)
    for _ in range(80):
        middle = (high + low) / 2
        above = 1 - (a.square() / (a - middle.unsqueeze(-1))).sum(-1) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(low == high, high, low)


def _negative_eigenvalue(a: Tensor) -> Float[Tensor, "*rows"]:
    """Of `diag(a) - a a^T`, which has at most one; 0 where weights sum to 1 or less."""
    low = -a.square().sum(-1)
    high = torch.zeros_like(low)
    for _ in range(80):
        middle = (high + low) / 2
        above = 1 - (a.square() / (a - middle.unsqueeze(-1))).sum(-1) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high.masked_fill(a.sum(-1) <= 1, 0.0)
