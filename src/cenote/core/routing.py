"""Which keys a query reads: pages of keys, what stands for a page, the best of them, and how many keys that is.

Keys count from the first real one of their item, so that padding on the left moves no page. Ties go to the lower number.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core.grouped import as_rows

Over = Literal["max", "sum", "mean"]


def page_means(
    k: Float[Tensor, "batch kv_heads keys width"], pages: Int[Tensor, "#batch #kv_heads keys"], count: int
) -> Float[Tensor, "batch kv_heads pages width"]:
    """The mean key of each page, zeros of one without keys.

    Args:
        k: the keys.
        pages: of each key, from 0; -1 for one that is in none.
        count: how many pages there are.

    Example:
        >>> page_means(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), torch.tensor([[[0, 0, 1]]]), 2).flatten().tolist()
        [2.0, 5.0]
    """
    at, inside = _at(k, pages)
    sums = k.new_zeros(*k.shape[:2], count + 1, k.shape[3]).scatter_add(2, at.unsqueeze(-1).expand_as(k), k)
    counts = k.new_zeros(*k.shape[:2], count + 1).scatter_add(2, at, inside.to(k.dtype))
    return sums[:, :, 1:] / counts[:, :, 1:].clamp(min=1).unsqueeze(-1)


def page_bounds(
    k: Float[Tensor, "batch kv_heads keys width"], pages: Int[Tensor, "#batch #kv_heads keys"], count: int
) -> tuple[Float[Tensor, "batch kv_heads pages width"], Float[Tensor, "batch kv_heads pages width"]]:
    """The least and the largest number of each channel among the keys of a page, zeros of one without keys.

    Args:
        k, pages, count: as of `page_means`.
    """
    at, _ = _at(k, pages)
    wide = at.unsqueeze(-1).expand_as(k)
    empty = k.new_zeros(*k.shape[:2], count + 1, k.shape[3])
    low, high = (empty.scatter_reduce(2, wide, k, how, include_self=False) for how in ("amin", "amax"))
    return low[:, :, 1:], high[:, :, 1:]


def bounded(
    q: Float[Tensor, "batch heads queries width"],
    low: Float[Tensor, "batch kv_heads pages width"],
    high: Float[Tensor, "batch kv_heads pages width"],
) -> Float[Tensor, "batch heads queries pages"]:
    """`sum_c max(q_c low_c, q_c high_c)`: no key of a page has a larger product with the query.

    Example:
        >>> q = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
        >>> low, high = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), torch.tensor([2.0, 3.0]).view(1, 1, 1, 2)
        >>> float(bounded(q, low, high))
        1.0
    """
    rows = as_rows(q, low.shape[1])
    found = rows.clamp(min=0) @ high.mT + rows.clamp(max=0) @ low.mT
    return found.reshape(q.shape[0], q.shape[1], q.shape[2], -1)


def over_group(
    x: Float[Tensor, "batch heads *rest"], kv_heads: int, how: Over = "max"
) -> Float[Tensor, "batch kv_heads *rest"]:
    """One number for the query heads that share a key head."""
    groups = x.unflatten(1, (kv_heads, -1))
    if how == "max":
        return groups.amax(2)
    return groups.sum(2) if how == "sum" else groups.mean(2)


def union(chosen: Bool[Tensor, "batch heads *rest"], kv_heads: int) -> Bool[Tensor, "batch kv_heads *rest"]:
    """What at least one query head of each key head chose: that is what is read from memory."""
    return chosen.unflatten(1, (kv_heads, -1)).any(2)


def best(
    scores: Float[Tensor, "*rows keys"], count: int, real: Bool[Tensor, "*#rows keys"] | None = None
) -> Bool[Tensor, "*rows keys"]:
    """The highest scores, so many of each row, fewer where fewer are real; of equal ones the first.

    Args:
        scores: any numbers; one of -inf is never chosen.
        count: how many.
        real: which may be chosen.

    Example:
        >>> best(torch.tensor([[1.0, 3.0, 1.0, 2.0]]), 3).tolist()
        [[True, True, False, True]]
    """
    scores = scores if real is None else scores.masked_fill(~real, float("-inf"))
    if count >= scores.shape[-1]:
        return scores > float("-inf")
    if count < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    chosen = scores >= least
    if bool((chosen.sum(-1) > count).any()):
        level = scores == least
        above = scores > least
        left = count - above.sum(-1, keepdim=True)
        chosen = above | (level & (level.long().cumsum(-1) <= left))
    return chosen & (scores > float("-inf"))


def best_numbers(
    scores: Float[Tensor, "batch heads keys"], count: int, real: Bool[Tensor, "batch #heads keys"] | None = None
) -> tuple[Int[Tensor, "batch heads most"], Bool[Tensor, "batch heads most"]]:
    """What `best` chooses, by its numbers in order, as `packed` gives them.

    Args:
        scores, count, real: as of `best`.
    """
    scores = scores if real is None else scores.masked_fill(~real, float("-inf"))
    if count < 1 or count >= scores.shape[-1]:
        return packed(best(scores, count))
    values, numbers = scores.topk(count, -1, sorted=False)
    least = values.amin(-1, keepdim=True)
    if bool(((scores >= least).sum(-1) > count).any()) or bool((least == float("-inf")).any()):
        return packed(best(scores, count))
    return numbers.sort(-1).values, torch.ones_like(numbers, dtype=torch.bool)


def spread(
    chosen: Bool[Tensor, "batch heads pages"], pages: Int[Tensor, "#batch #heads keys"]
) -> Bool[Tensor, "batch heads keys"]:
    """The keys of the chosen pages."""
    batch, heads, _ = chosen.shape
    at = pages.expand(batch, heads, -1)
    return chosen.gather(2, at.clamp(min=0)) & (at >= 0)


def packed(
    chosen: Bool[Tensor, "batch heads keys"],
) -> tuple[Int[Tensor, "batch heads most"], Bool[Tensor, "batch heads most"]]:
    """Numbers of the chosen keys, in order, and which of these are not there only to fill up a head that has fewer.

    Example:
        >>> numbers, valid = packed(torch.tensor([[[True, False, True], [False, True, False]]]))
        >>> numbers.tolist(), valid.tolist()
        ([[[0, 2], [1, 0]]], [[[True, True], [True, False]]])
    """
    counts = chosen.sum(-1)
    most = int(counts.max()) if counts.numel() else 0
    valid = torch.arange(most, device=chosen.device) < counts.unsqueeze(-1)
    numbers = torch.zeros(valid.shape, dtype=torch.long, device=chosen.device)
    numbers[valid] = chosen.nonzero()[:, -1]
    return numbers, valid


def counted(
    numbers: Int[Tensor, "batch heads most"], valid: Bool[Tensor, "batch heads most"], kv_heads: int, keys: int
) -> Int[Tensor, "batch kv_heads"]:
    """How many keys of each key head are read: those of several query heads of a group once.

    Example:
        >>> numbers = torch.tensor([[[0, 2], [2, 3]]])
        >>> counted(numbers, torch.ones(1, 2, 2, dtype=torch.bool), kv_heads=1, keys=4).tolist()
        [[3]]
    """
    # one column more takes what only fills up
    at = numbers.masked_fill(~valid, keys).unflatten(1, (kv_heads, -1)).flatten(2)
    read = torch.zeros(*at.shape[:2], keys + 1, dtype=torch.bool, device=at.device).scatter(2, at, True)
    return read[..., :keys].sum(-1)


def _at(k: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Where each key is gathered, 0 for one in no page; and whether it is in one."""
    at = pages.expand(*k.shape[:3]) + 1
    return at, at > 0
