"""Reductions over the segments of a ragged batch: rows `offsets[b]:offsets[b+1]` belong to set `b`.

Every function is differentiable in its floating point arguments, gives zeros for an empty segment, and keeps the sums of
half precision in float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Sets with fewer numbers than this are multiplied together with all others of their length. Copying them side by side then
# costs less than starting one matrix product per set: measured on CPUs with 1 to 12 heads, both ways cost the same near it.
SMALL_SET = 4096


def segment_index(offsets: Int[Tensor, "sets_plus_1"], total: int) -> Int[Tensor, "total"]:
    """The set that each row belongs to."""
    sets = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(sets, offsets.diff(), output_size=total)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens of this dtype are kept: float32 for half precision, else its own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def flush_tiny(weights: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Zero the weights below 1e-30: as denormal numbers they would slow a matrix product down some twenty times."""
    # in place where no backward pass needs what stood there before: a fresh block costs more than the step
    return torch.nn.functional.threshold(weights, 1e-30, 0.0, inplace=not torch.is_grad_enabled())


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
    centred = wide - mean.index_select(0, segment_index(offsets, values.shape[0]))
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
    # an infinite shift would turn inf - inf into NaN
    top = top.masked_fill(top.isinf(), 0)
    index = segment_index(offsets, values.shape[0])
    total = segment_sum((wide - top.index_select(0, index)).exp(), offsets)
    nonempty = _nonempty(offsets, total)
    log = torch.where(nonempty, total, total.new_ones(())).log() + top
    return torch.where(nonempty, log, log.new_zeros(())).to(values.dtype)


def segment_softmax(
    scores: Float[Tensor, "total *channels"], offsets: Int[Tensor, "sets_plus_1"]
) -> Float[Tensor, "total *channels"]:
    """`w_n = exp(s_n) / sum_m exp(s_m)` within each set, per channel; each needs one finite score."""
    wide = scores.to(accumulation_dtype(scores.dtype))
    index = segment_index(offsets, scores.shape[0])
    top = segment_max(wide.detach(), offsets)
    unnormalised = (wide - top.index_select(0, index)).exp()
    total = segment_sum(unnormalised, offsets)
    return flush_tiny(unnormalised / total.index_select(0, index)).to(scores.dtype)


def segment_matmul(
    weights: Float[Tensor, "total heads"],
    values: Float[Tensor, "total dim"],
    offsets: Int[Tensor, "sets_plus_1"],
) -> Float[Tensor, "sets heads dim"]:
    """`y_bh = sum_n w_nh v_n`, without a `total x heads x dim` intermediate."""
    lengths = offsets.diff()
    if not lengths.numel():
        return values.new_zeros((0, weights.shape[1], values.shape[1]))
    if not _sets_are_small(values, offsets):
        rows = lengths.tolist()
        # split and not slices: the gradient of each slice would be as large as all sets together
        return torch.stack([w.T @ v for w, v in zip(weights.split(rows), values.split(rows), strict=True)])
    same = _SameLength(offsets, values.shape[0])
    pairs = zip(same.cut(weights), same.cut(values), strict=True)
    return same.sets_back(torch.cat([w.transpose(1, 2) @ v for w, v in pairs]))


def segment_scores(
    values: Float[Tensor, "total dim"],
    queries: Float[Tensor, "sets heads dim"],
    offsets: Int[Tensor, "sets_plus_1"],
) -> Float[Tensor, "total heads"]:
    """`s_nh = q_bh . v_n` for the set `b` that row `n` belongs to."""
    lengths = offsets.diff()
    if not lengths.numel():
        return values.new_zeros((0, queries.shape[1]))
    if not _sets_are_small(values, offsets):
        rows = lengths.tolist()
        return torch.cat([v @ q.T for v, q in zip(values.split(rows), queries.unbind(), strict=True)])
    same = _SameLength(offsets, values.shape[0])
    pairs = zip(same.cut(values), same.cut_sets(queries), strict=True)
    return same.rows_back(torch.cat([(v @ q.transpose(1, 2)).flatten(0, 1) for v, q in pairs]))


class _SameLength:
    """Sets of equal length brought together, so that each length needs one batched matrix product."""

    def __init__(self, offsets: Int[Tensor, "sets_plus_1"], total: int) -> None:
        lengths = offsets.diff()
        sorted_lengths, self._sets = lengths.sort(stable=True)
        distinct, counts = sorted_lengths.unique_consecutive(return_counts=True)
        self._groups = list(zip(distinct.tolist(), counts.tolist(), strict=True))
        self._one_length = len(self._groups) == 1
        if not self._one_length:
            starts = offsets[:-1].index_select(0, self._sets) - (sorted_lengths.cumsum(0) - sorted_lengths)
            shift = torch.repeat_interleave(starts, sorted_lengths, output_size=total)
            self._rows = torch.arange(total, device=offsets.device) + shift

    def cut(self, v: Float[Tensor, "total channels"]) -> list[Float[Tensor, "_sets _tokens channels"]]:
        """The rows of each group of sets."""
        v = v if self._one_length else v.index_select(0, self._rows)
        pieces = v.split([length * count for length, count in self._groups])
        return [
            piece.view(count, length, v.shape[1]) for piece, (length, count) in zip(pieces, self._groups, strict=True)
        ]

    def cut_sets(self, per_set: Float[Tensor, "sets heads dim"]) -> tuple[Float[Tensor, "_sets heads dim"], ...]:
        """What belongs to the sets of each group."""
        per_set = per_set if self._one_length else per_set.index_select(0, self._sets)
        return per_set.split([count for _, count in self._groups])

    def sets_back(self, by_group: Float[Tensor, "sets heads dim"]) -> Float[Tensor, "sets heads dim"]:
        """Undo the order of the groups, for something that each set has."""
        return by_group if self._one_length else by_group.index_select(0, _inverse(self._sets))

    def rows_back(self, by_group: Float[Tensor, "total heads"]) -> Float[Tensor, "total heads"]:
        """Undo the order of the groups, for something that each row has."""
        return by_group if self._one_length else by_group.index_select(0, _inverse(self._rows))


def _sets_are_small(values: Float[Tensor, "total dim"], offsets: Int[Tensor, "sets_plus_1"]) -> bool:
    return values.numel() < SMALL_SET * (offsets.numel() - 1)


def _inverse(permutation: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    return torch.empty_like(permutation).scatter(
        0, permutation, torch.arange(len(permutation), device=permutation.device)
    )


def _counts(offsets: Int[Tensor, "sets_plus_1"], like: Tensor) -> Float[Tensor, "sets *ones"]:
    counts = offsets.diff().clamp(min=1).to(like.dtype)
    return counts.view(-1, *[1] * (like.dim() - 1))


def _nonempty(offsets: Int[Tensor, "sets_plus_1"], like: Tensor) -> Bool[Tensor, "sets *ones"]:
    return (offsets.diff() > 0).view(-1, *[1] * (like.dim() - 1))
