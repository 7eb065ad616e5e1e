"""Reductions over the segments of a ragged batch: rows `offsets[b]:offsets[b+1]` belong to set `b`.

Every function is differentiable in its floating point arguments, gives zeros for an empty segment, and computes half
precision in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def segment_index(offsets: Int[Tensor, "sets_plus_1"], total: int) -> Int[Tensor, "total"]:
    """The set that each row belongs to."""
    sets = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(sets, offsets.diff(), output_size=total)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens of this dtype are kept: float32 for half precision, else its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def flush_tiny(weights: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Zero the weights below 1e-30: as denormal numbers they would slow a matrix product down some twenty times."""
    return torch.nn.functional.threshold(weights, 1e-30, 0.0)


def segment_sum(
    values: Float[Tensor, "total *channels"], offsets: Int[Tensor, "sets_plus_1"]
) -> Float[Tensor, "sets *channels"]:
    """`y_b = sum_n v_n` over the rows of each set."""
    index = segment_index(offsets, values.shape[0])
    out = values.new_zeros((offsets.numel() - 1, *values.shape[1:]), dtype=accumulation_dtype(values.dtype))
    return out.index_add(0, index, values.to(out.dtype)).to(values.dtype)


def segment_mean(
    values: Float[Tensor, "total *channels"], offsets: Int[Tensor, "sets_plus_1"]
) -> Float[Tensor, "sets *channels"]:
    """`y_b = (1/N_b) sum_n v_n`; zeros where `N_b = 0`."""
    total = segment_sum(values.to(accumulation_dtype(values.dtype)), offsets)
    return (total / _counts(offsets, total)).to(values.dtype)


def segment_std(
    values: Float[Tensor, "total *channels"], offsets: Int[Tensor, "sets_plus_1"], eps: float = 1e-8
) -> Float[Tensor, "sets *channels"]:
    """Population standard deviation `sqrt(mean((v - mean(v))^2) + eps)`; zeros where a set is empty."""
    wide = values.to(accumulation_dtype(values.dtype))
    mean = segment_mean(wide, offsets)
    centred = wide - mean[segment_index(offsets, values.shape[0])]
    std = (segment_mean(centred.square(), offsets) + eps).sqrt()
    return torch.where(_nonempty(offsets, std), std, std.new_zeros(())).to(values.dtype)


def segment_max(
    values: Float[Tensor, "total *channels"], offsets: Int[Tensor, "sets_plus_1"]
) -> Float[Tensor, "sets *channels"]:
    """Largest value of each channel in each set; zeros where a set is empty."""
    sets = offsets.numel() - 1
    index = segment_index(offsets, values.shape[0])
    index = index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    out = values.new_zeros((sets, *values.shape[1:]))
    return out.scatter_reduce(0, index, values, reduce="amax", include_self=False)


def segment_logsumexp(
    values: Float[Tensor, "total *channels"], offsets: Int[Tensor, "sets_plus_1"]
) -> Float[Tensor, "sets *channels"]:
    """`y_b = log sum_n exp(v_n)`, shifted by each set's maximum; zeros (not -inf) where a set is empty."""
    wide = values.to(accumulation_dtype(values.dtype))
    top = segment_max(wide.detach(), offsets)
    index = segment_index(offsets, values.shape[0])
    total = segment_sum((wide - top[index]).exp(), offsets)
    nonempty = _nonempty(offsets, total)
    log = torch.where(nonempty, total, total.new_ones(())).log() + top
    return torch.where(nonempty, log, log.new_zeros(())).to(values.dtype)


def segment_softmax(
    scores: Float[Tensor, "total *channels"], offsets: Int[Tensor, "sets_plus_1"]
) -> Float[Tensor, "total *channels"]:
    """`w_n = exp(s_n) / sum_m exp(s_m)` within each set, per channel."""
    wide = scores.to(accumulation_dtype(scores.dtype))
    index = segment_index(offsets, scores.shape[0])
    top = segment_max(wide.detach(), offsets)
    unnormalised = (wide - top[index]).exp()
    return flush_tiny(unnormalised / segment_sum(unnormalised, offsets)[index]).to(scores.dtype)


def segment_matmul(
    weights: Float[Tensor, "total heads"],
    values: Float[Tensor, "total dim"],
    offsets: Int[Tensor, "sets_plus_1"],
) -> Float[Tensor, "sets heads dim"]:
    """`y_bh = sum_n w_nh v_n`: one small matrix product per set, no `total x heads x dim` intermediate."""
    bounds = offsets.tolist()
    pooled = [weights[i:j].T @ values[i:j] for i, j in zip(bounds[:-1], bounds[1:], strict=True)]
    if not pooled:
        return values.new_zeros((0, weights.shape[1], values.shape[1]))
    return torch.stack(pooled)


def segment_scores(
    values: Float[Tensor, "total dim"],
    queries: Float[Tensor, "sets heads dim"],
    offsets: Int[Tensor, "sets_plus_1"],
) -> Float[Tensor, "total heads"]:
    """`s_nh = q_bh . v_n` for the set `b` that row `n` belongs to."""
    bounds = offsets.tolist()
    scores = [values[i:j] @ queries[b].T for b, (i, j) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))]
    if not scores:
        return values.new_zeros((0, queries.shape[1]))
    return torch.cat(scores)


def _counts(offsets: Int[Tensor, "sets_plus_1"], like: Tensor) -> Float[Tensor, "sets *ones"]:
    counts = offsets.diff().clamp(min=1).to(like.dtype)
    return counts.view(-1, *[1] * (like.dim() - 1))


def _nonempty(offsets: Int[Tensor, "sets_plus_1"], like: Tensor) -> Bool[Tensor, "sets *ones"]:
    return (offsets.diff() > 0).view(-1, *[1] * (like.dim() - 1))
