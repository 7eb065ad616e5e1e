"""Means of segments, and the way back to the tokens, differentiable in where the cuts are.

    g_t = sum_{s<t} b_s,  short_j = mean of h_t with g_t = j;      u_t = sum_{s<=t} b_s,  up_t = (null, short)_{u_t}

The authors' gradient to `b` goes through `W = (1 - Z) 1[Z = 0]`, `Z = j - g`, a `[tokens, segments]` matrix of zeros and
ones. One weight per token, of value 1 and with the gradient of `g_t`, says the same exactly, without the matrix.

Source: Nawrot, Chorowski, Lancucki and Ponti (2023), arXiv 2211.09761.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cenote.core import InputError
from cenote.core.segments import accumulation_dtype

EPS = 1e-9
"""Added to sums of weights, as the authors do; nothing to be seen of it in float32."""


def downsample(
    boundaries: Float[Tensor, "batch tokens"],
    hidden: Float[Tensor, "batch tokens dim"],
    null_group: Float[Tensor, "1 1 dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    bidirectional: bool = False,
) -> Float[Tensor, "batch short dim"]:
    """The null group, and behind it the mean of each segment.

    Args:
        boundaries: 1 at the last token of a segment, else 0; gradients reach them.
        hidden: states.
        null_group: what stands for the segments that are not over yet.
        mask: True = a real token; others belong to no segment.
        bidirectional: also of the last segment, which nothing has closed.

    Returns:
        As many rows as the item with the most segments has, and one; rows that an item has too many are zeros.

    >>> downsample(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[[1.0], [3.0], [9.0]]]), torch.zeros(1, 1, 1)).flatten()
    tensor([0., 2.])
    """
    if boundaries.shape != hidden.shape[:2]:
        raise InputError(
            f"boundaries: expected {list(hidden.shape[:2])} as the states, got {list(boundaries.shape)}; a row per item"
        )
    cuts = cleaned(boundaries, mask)
    own, weight = _grouped(cuts, closed=False)
    closed = cuts.detach().sum(1, keepdim=True).round().long()
    member = torch.ones_like(own, dtype=torch.bool) if mask is None else mask
    if not bidirectional:
        member = member & (own < closed)
    segments = int(segment_counts(cuts, mask, bidirectional).max()) if own.numel() else 0
    row = own.clamp(max=max(segments - 1, 0))
    weight = torch.where(member, weight, torch.zeros_like(weight))
    values = torch.where(member[..., None], hidden, torch.zeros_like(hidden)).to(weight.dtype) * weight[..., None]
    total = values.new_zeros(len(hidden), max(segments, 1), hidden.shape[-1])
    total = total.scatter_add(1, row[..., None].expand_as(values), values)
    count = weight.new_zeros(len(hidden), max(segments, 1)).scatter_add(1, row, weight)
    means = (total / (count + EPS)[..., None])[:, :segments].to(hidden.dtype)
    return torch.cat([null_group.to(hidden.dtype).expand(len(hidden), -1, -1), means], 1)


def upsample(
    boundaries: Float[Tensor, "batch tokens"],
    short: Float[Tensor, "batch short dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    bidirectional: bool = False,
) -> Float[Tensor, "batch tokens dim"]:
    """Each token is given the segment that ended last, at it or before it; so nothing that comes later leaks.

    Args:
        boundaries: as for `downsample`.
        short: what became of its rows.
        mask: as for `downsample`.
        bidirectional: each token is given its own segment instead.

    >>> short = torch.tensor([[[0.0], [2.0]]])
    >>> upsample(torch.tensor([[0.0, 1.0, 0.0]]), short).flatten()
    tensor([0., 2., 2.])
    """
    if boundaries.shape[0] != short.shape[0]:
        raise InputError(f"short: expected {len(boundaries)} items as the boundaries, got {len(short)}")
    given, weight = _grouped(cleaned(boundaries, mask), closed=not bidirectional)
    # own segments come behind the null group
    given = given + int(bidirectional)
    found = short.gather(1, given.clamp(max=short.shape[1] - 1)[..., None].expand(-1, -1, short.shape[-1]))
    return (found * (weight / (weight + EPS))[..., None]).to(short.dtype)


def segment_counts(
    boundaries: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    unfinished: bool = False,
) -> Int[Tensor, "batch"]:
    """How many segments each item has, with the one at its end that is not over yet or without.

    >>> cuts = torch.tensor([[0.0, 1.0, 0.0]])
    >>> segment_counts(cuts).item(), segment_counts(cuts, unfinished=True).item()
    (1, 2)
    """
    cuts = cleaned(boundaries, mask).detach()
    closed = cuts.sum(1).round().long()
    if not unfinished:
        return closed
    before = (cuts.cumsum(1) - cuts).round().long()
    real = torch.ones_like(before, dtype=torch.bool) if mask is None else mask
    return (before + 1).masked_fill(~real, 0).amax(1) if before.shape[1] else closed


def segment_assignment(
    boundaries: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Int[Tensor, "batch tokens"]:
    """The number of the segment that each token is in, from 0, as `Reduced.assignment`; -1 for padding.

    >>> segment_assignment(torch.tensor([[0.0, 1.0, 0.0]])).tolist()
    [[0, 0, 1]]
    """
    own, _ = _grouped(cleaned(boundaries, mask).detach(), closed=False)
    return own if mask is None else own.masked_fill(~mask, -1)


def cleaned(
    boundaries: Shaped[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch tokens"]:
    """Without cuts in padding, in a dtype that can count."""
    cuts = boundaries.to(accumulation_dtype(boundaries.dtype)) if boundaries.is_floating_point() else boundaries.float()
    return cuts if mask is None else torch.where(mask, cuts, torch.zeros_like(cuts))


def _grouped(
    cuts: Float[Tensor, "batch tokens"], closed: bool
) -> tuple[Int[Tensor, "batch tokens"], Float[Tensor, "batch tokens"]]:
    """`u` or `g` of each token, and a 1 that has its gradient."""
    number = cuts.cumsum(1) if closed else cuts.cumsum(1) - cuts
    return number.detach().round().long(), 1 + number - number.detach()
