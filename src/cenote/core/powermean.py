"""The power mean, evaluated in the log domain so that no exponent overflows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cenote.core.segments import accumulation_dtype
from cenote.core.sets import PaddedTokens, Tokens

Positive = Float[Tensor, "*rows channels"] | Callable[[Tensor], Tensor]

# Below this |p| the logarithm of the mean divided by p would lose more digits than the series about p = 0 leaves out.
SERIES_BELOW = {torch.float32: 1e-3, torch.float64: 1e-5}
NUMBERS_AT_ONCE = 2**20


def power_mean(
    tokens: Tokens,
    v: Positive,
    p: Float[Tensor, "#channels"],
    weights: Float[Tensor, "*rows #channels"] | None = None,
) -> Float[Tensor, "batch channels"]:
    """Power mean of positive values over each set.

    `y = (sum_n w_n v_n^p)^(1/p) = exp((logsumexp_n(p log v_n + log w_n)) / p)`, with `w_n = 1/N` by default. At `p = 0` that
    is the geometric mean; near it `y = exp(m + p/2 s^2)` with the mean `m` and variance `s^2` of `log v_n` under the weights.

    Args:
        tokens: says which rows belong together.
        v: positive values, one row per token (the caller clamps or shifts), or how to make them from rows of tokens: then
            a huge set is read piece by piece.
        p: exponents, one per channel or one for all.
        weights: weights that sum to 1 over each set.

    Returns:
        `[batch, channels]`; zeros for an empty set.
    """
    wide = accumulation_dtype(tokens.values.dtype)
    p = p.to(wide)
    near_zero = p.abs() < SERIES_BELOW[wide]
    safe_p = torch.where(near_zero, torch.ones_like(p), p)
    if weights is None:
        log_of_sum, sum_of_logs, sum_of_squares = _huge_or_not(tokens, v, safe_p)
        counts = tokens.lengths().clamp(min=1).to(wide).unsqueeze(-1)
        by_power = (log_of_sum - counts.log()) / safe_p
        mean, mean_square = sum_of_logs / counts, sum_of_squares / counts
    else:
        log_v = (v(tokens.values) if callable(v) else v).to(wide).log()
        w = weights.to(wide)
        tiny = torch.finfo(wide).tiny
        # a finite number, far below all others, stands for log(0): it has a gradient
        log_w = torch.where(w < tiny, -1e30, w.clamp(min=tiny).log())
        by_power = tokens.logsumexp(safe_p * log_v + log_w) / safe_p
        mean, mean_square = tokens.sum(w * log_v), tokens.sum((w * log_v.square()).detach())
    # the variance is there for the gradient of p; its own, of order p, would cost a pass over all tokens
    series = mean + p / 2 * (mean_square - mean.detach().square())
    nonempty = (tokens.lengths() > 0).unsqueeze(-1)
    y = torch.where(near_zero, series, by_power).exp()
    return torch.where(nonempty, y, y.new_zeros(())).to(tokens.values.dtype)


def _huge_or_not(tokens: Tokens, v: Positive, p: Float[Tensor, "#channels"]) -> tuple[Tensor, Tensor, Tensor]:
    x = tokens.values
    if (
        not callable(v)
        or not isinstance(tokens, PaddedTokens)
        or tokens.mask is not None
        or x.numel() <= 4 * NUMBERS_AT_ONCE
        or torch.compiler.is_compiling()
    ):
        return _log_sums(tokens, v(x) if callable(v) else v, p)

    def of_piece(piece: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _log_sums(PaddedTokens(piece), v(piece), p)

    # logarithms and powers of a huge set, piece by piece, made again in the backward pass
    pieces = x.split(max(1, NUMBERS_AT_ONCE // (x.shape[0] * x.shape[2])), 1)
    parts = [checkpoint(of_piece, piece, p, use_reentrant=False) for piece in pieces]
    logs_of_sums, sums, squares = (torch.stack(part) for part in zip(*parts, strict=True))
    return logs_of_sums.logsumexp(0), sums.sum(0), squares.sum(0)


def _log_sums(
    tokens: Tokens, v: Float[Tensor, "*rows channels"], p: Float[Tensor, "#channels"]
) -> tuple[Tensor, Tensor, Tensor]:
    log_v = v.to(accumulation_dtype(v.dtype)).log()
    return tokens.logsumexp(p * log_v), tokens.sum(log_v), tokens.sum(log_v.detach().square())
