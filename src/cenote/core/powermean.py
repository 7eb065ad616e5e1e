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

GEOMETRIC_BELOW = 1e-4
NUMBERS_AT_ONCE = 2**20


def power_mean(
    tokens: Tokens,
    v: Positive,
    p: Float[Tensor, "#channels"],
    weights: Float[Tensor, "*rows #channels"] | None = None,
) -> Float[Tensor, "batch channels"]:
    """Power mean of positive values over each set.

    `y = (sum_n w_n v_n^p)^(1/p) = exp((logsumexp_n(p log v_n + log w_n)) / p)`, with `w_n = 1/N` by default; the geometric
    mean `exp(sum_n w_n log v_n)` where `|p| < 1e-4`.

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
    geometric = p.abs() < GEOMETRIC_BELOW
    safe_p = torch.where(geometric, torch.ones_like(p), p)
    if weights is None:
        log_of_sum, sum_of_logs = _huge_or_not(tokens, v, safe_p)
        counts = tokens.lengths().clamp(min=1).to(wide).unsqueeze(-1)
        by_power, by_logs = (log_of_sum - counts.log()) / safe_p, sum_of_logs / counts
    else:
        log_v = (v(tokens.values) if callable(v) else v).to(wide).log()
        # the smallest normal number stands for a weight of zero: log(0) has no finite gradient
        log_w = weights.to(wide).clamp(min=torch.finfo(wide).tiny).log()
        by_power = tokens.logsumexp(safe_p * log_v + log_w) / safe_p
        by_logs = tokens.sum(weights.to(wide) * log_v)
    nonempty = (tokens.lengths() > 0).unsqueeze(-1)
    y = torch.where(geometric, by_logs, by_power).exp()
    return torch.where(nonempty, y, y.new_zeros(())).to(tokens.values.dtype)


def _huge_or_not(tokens: Tokens, v: Positive, p: Float[Tensor, "#channels"]) -> tuple[Tensor, Tensor]:
    x = tokens.values
    if (
        not callable(v)
        or not isinstance(tokens, PaddedTokens)
        or tokens.mask is not None
        or x.numel() <= 4 * NUMBERS_AT_ONCE
        or torch.compiler.is_compiling()
    ):
        return _log_sums(tokens, v(x) if callable(v) else v, p)

    def of_piece(piece: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        return _log_sums(PaddedTokens(piece), v(piece), p)

    # logarithms and powers of a huge set, piece by piece, made again in the backward pass
    pieces = x.split(max(1, NUMBERS_AT_ONCE // (x.shape[0] * x.shape[2])), 1)
    parts = [checkpoint(of_piece, piece, p, use_reentrant=False) for piece in pieces]
    return torch.stack([a for a, _ in parts]).logsumexp(0), torch.stack([b for _, b in parts]).sum(0)


def _log_sums(
    tokens: Tokens, v: Float[Tensor, "*rows channels"], p: Float[Tensor, "#channels"]
) -> tuple[Tensor, Tensor]:
    log_v = v.to(accumulation_dtype(v.dtype)).log()
    return tokens.logsumexp(p * log_v), tokens.sum(log_v)
