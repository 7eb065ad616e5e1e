"""Sums over subsets of given sizes, in logarithms: what a posterior over sets of parents is made of."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NOTHING = -1e30
"""Stands for -inf where gradients pass: the sum of two of them must have one."""


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """`log(exp a + exp b)`; unlike torch's own its second derivative has no NaN where the two are far apart."""
    return torch.stack([a, b]).logsumexp(0)


def log_elementary(theta: Float[Tensor, "*rows keys"], size: int) -> Float[Tensor, "*rows sizes"]:
    """`log e_k(exp theta)` for k = 0 to `size`: the sum over all subsets of k keys of the product of their weights.

    >>> log_elementary(torch.zeros(4), 2).exp()
    tensor([1., 4., 6.])
    """
    return prefixes(theta, size)[..., -1, :]


def prefixes(theta: Float[Tensor, "*rows keys"], size: int) -> Float[Tensor, "*rows keys_and_one sizes"]:
    """The same of the first 0, 1, ... keys."""
    theta = theta.clamp(min=NOTHING)
    empty = torch.cat(
        [torch.zeros_like(theta[..., :1]), torch.full_like(theta[..., :1], NOTHING).expand(*theta.shape[:-1], size)], -1
    )
    found = [empty]
    for i in range(theta.shape[-1]):
        before = found[-1]
        taken = (theta[..., i : i + 1] + before[..., :-1]).clamp(min=NOTHING)
        found.append(torch.cat([before[..., :1], log_add(before[..., 1:], taken)], -1))
    return torch.stack(found, -2)


def subset_marginals(
    theta: Float[Tensor, "*rows keys"], log_sizes: Float[Tensor, "*#rows sizes"]
) -> Float[Tensor, "*rows keys"]:
    """`P_j = w_j sum_k c_k e_(k-1)(w without j) / sum_k c_k e_k(w)`, w = exp theta, c the weights of the sizes 0, 1, ...

    The sums without j are those of what stands before it times those of what stands behind, so that nothing is subtracted.

    >>> subset_marginals(torch.zeros(4), torch.tensor([-torch.inf, -torch.inf, 0.0]))
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    size = log_sizes.shape[-1] - 1
    if size == 0:
        return torch.zeros_like(theta)
    log_sizes = log_sizes.clamp(min=NOTHING)
    before = prefixes(theta, size)
    behind = prefixes(theta.flip(-1), size).flip(-2)
    total = (before[..., -1, :] + log_sizes).logsumexp(-1, keepdim=True)
    # a keys before j and b behind it, and j: a + b + 1 of them
    parts = before[..., :-1, :-1].unsqueeze(-1) + behind[..., 1:, :-1].unsqueeze(-2)
    number = torch.arange(size, device=theta.device)
    number = number[:, None] + number + 1
    allowed = torch.where(
        number <= size, log_sizes[..., number.clamp(max=size)], torch.full_like(log_sizes[..., :1, None], NOTHING)
    )
    without = (parts + allowed.unsqueeze(-3)).clamp(min=NOTHING).flatten(-2).logsumexp(-1)
    return (theta.clamp(min=NOTHING) + without - total).exp()


def sampled_subsets(
    theta: Float[Tensor, "*rows keys"], sizes: Int[Tensor, "*rows"], generator: torch.Generator | None = None
) -> Bool[Tensor, "*rows keys"]:
    """A subset of each row, of its size, as probable as the product of its weights."""
    table = prefixes(theta, int(sizes.max()) if sizes.numel() else 0)
    left, chosen = sizes.clone(), torch.zeros_like(theta, dtype=torch.bool)
    for i in range(theta.shape[-1] - 1, -1, -1):
        with_it = theta[..., i] + table[..., i, :].gather(-1, (left - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        of_all = table[..., i + 1, :].gather(-1, left.unsqueeze(-1)).squeeze(-1)
        drawn = torch.rand(left.shape, generator=generator, dtype=theta.dtype, device=theta.device)
        taken = (left > 0) & (drawn.log() < with_it - of_all)
        chosen[..., i], left = taken, left - taken.long()
    return chosen


def best_subset(
    theta: Float[Tensor, "*rows keys"], log_sizes: Float[Tensor, "*#rows sizes"]
) -> Bool[Tensor, "*rows keys"]:
    """The keys of the most probable subset."""
    ordered, order = theta.sort(dim=-1, descending=True, stable=True)
    size = log_sizes.shape[-1]
    summed = torch.cat([torch.zeros_like(ordered[..., :1]), ordered.cumsum(-1)], -1)[..., :size]
    count = (summed + log_sizes[..., : summed.shape[-1]]).argmax(-1, keepdim=True)
    rank = torch.arange(theta.shape[-1], device=theta.device)
    found = torch.zeros_like(theta, dtype=torch.bool).scatter(-1, order, (rank < count).expand_as(order))
    return found & (theta > -math.inf)
