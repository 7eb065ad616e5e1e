"""The power mean, evaluated in the log domain so that no exponent overflows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Tokens

GEOMETRIC_BELOW = 1e-4


def power_mean(
    tokens: Tokens,
    v: Float[Tensor, "*rows channels"],
    p: Float[Tensor, "#channels"],
    weights: Float[Tensor, "*rows #channels"] | None = None,
) -> Float[Tensor, "batch channels"]:
    """Power mean of positive values over each set.

    `y = (sum_n w_n v_n^p)^(1/p) = exp((logsumexp_n(p log v_n + log w_n)) / p)`, with `w_n = 1/N` by default; the geometric
    mean `exp(sum_n w_n log v_n)` where `|p| < 1e-4`.

    Args:
        tokens: says which rows belong together.
        v: positive values, one row per token (the caller clamps or shifts).
        p: exponents, one per channel or one for all.
        weights: weights that sum to 1 over each set.

    Returns:
        `[batch, channels]`; zeros for an empty set.
    """
    wide = accumulation_dtype(v.dtype)
    log_v = v.to(wide).log()
    w = tokens.uniform() if weights is None else weights
    w = w.to(wide)
    p = p.to(wide)
    geometric = p.abs() < GEOMETRIC_BELOW
    safe_p = torch.where(geometric, torch.ones_like(p), p)
    # the smallest normal number stands for a weight of zero: log(0) has no finite gradient
    log_w = w.clamp(min=torch.finfo(wide).tiny).log()
    by_power = tokens.logsumexp(safe_p * log_v + log_w) / safe_p
    by_logs = tokens.sum(w * log_v)
    nonempty = (tokens.lengths() > 0).unsqueeze(-1)
    y = torch.where(geometric, by_logs, by_power).exp()
    return torch.where(nonempty, y, y.new_zeros(())).to(v.dtype)
