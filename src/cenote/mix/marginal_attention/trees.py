"""Sums over spanning trees by the matrix-tree theorem, the best tree, and samples of trees.

Source: Tutte (1948); Koo, Globerson, Carreras and Collins (2007); Wilson (1996); Edmonds (1967).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.mix.marginal_attention.subsets import NOTHING, log_add


def log_trees(
    theta: Float[Tensor, "*sets nodes nodes"], real: Bool[Tensor, "*sets nodes"] | None = None
) -> Float[Tensor, "*sets"]:
    """Logarithm of the sum over undirected spanning trees of the product of `exp(theta_ij + theta_ji)`.

    Args:
        theta: -inf where there is no edge.
        real: False where there is no node.

    Raises:
        InputError: where no tree joins all nodes.

    >>> log_trees(torch.zeros(3, 3, dtype=torch.float64)).exp()
    tensor(3.0000, dtype=torch.float64)
    """
    return _eliminated(theta + theta.mT, real)[0]


def log_rooted(
    theta: Float[Tensor, "*sets nodes nodes"], real: Bool[Tensor, "*sets nodes"] | None = None
) -> Float[Tensor, "*sets"]:
    """The same of trees in which every node but one, the root, has a parent: `theta_ij` of i with the parent j.

    >>> log_rooted(torch.zeros(3, 3, dtype=torch.float64)).exp()
    tensor(9.0000, dtype=torch.float64)
    """
    last, roots = _eliminated(theta, real)
    return last + roots.logsumexp(-1)


def edge_marginals(
    theta: Float[Tensor, "*sets nodes nodes"], real: Bool[Tensor, "*sets nodes"], rooted: bool
) -> Float[Tensor, "*sets nodes nodes"]:
    """Probability of each edge, the gradient of the logarithm of the sum; gradients pass through it."""
    told = theta.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        held = theta if told else theta.detach().requires_grad_()
        total = (log_rooted if rooted else log_trees)(held, real).sum()
        return torch.autograd.grad(total, held, create_graph=told)[0]


def best_tree(theta: Float[Tensor, "nodes nodes"], real: Bool[Tensor, "nodes"]) -> Bool[Tensor, "nodes nodes"]:
    """The undirected tree of the largest sum, edges in both directions; grown from one node."""
    both, found = theta + theta.mT, torch.zeros_like(theta, dtype=torch.bool)
    left = real.nonzero().flatten().tolist()
    inside = left[:1]
    left = left[1:]
    while left:
        across = both[inside][:, left]
        best = int(across.argmax())
        i, j = inside[best // len(left)], left[best % len(left)]
        found[i, j] = found[j, i] = True
        inside.append(j)
        left.remove(j)
    return found


def best_rooted(theta: Float[Tensor, "nodes nodes"], real: Bool[Tensor, "nodes"]) -> Bool[Tensor, "nodes nodes"]:
    """The rooted tree of the largest sum: row i has its parent, the root's none."""
    nodes = real.nonzero().flatten().tolist()
    found = torch.zeros_like(theta, dtype=torch.bool)
    score = {(i, j): float(theta[i, j]) for i in nodes for j in nodes if i != j and theta[i, j] > -math.inf}
    best, parents = -math.inf, {}
    for root in nodes:
        tree = _arborescence({(i, j): s for (i, j), s in score.items() if i != root}, set(nodes), root)
        total = sum(score[edge] for edge in tree.items()) if tree is not None else -math.inf
        if tree is not None and total > best:
            best, parents = total, tree
    for i, j in parents.items():
        found[i, j] = True
    return found


def sampled_tree(
    theta: Float[Tensor, "nodes nodes"],
    real: Bool[Tensor, "nodes"],
    rooted: bool,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "nodes nodes"]:
    """A tree as probable as the product of its weights, by walks that forget their loops."""
    nodes = real.nonzero().flatten().tolist()
    found = torch.zeros_like(theta, dtype=torch.bool)
    theta = theta if rooted else theta + theta.mT
    root = nodes[0] if nodes else 0
    if rooted and nodes:
        roots = _eliminated(theta, real)[1]
        root = int(torch.multinomial(_distribution(roots), 1, generator=generator))
    reached = {root}
    for start in nodes:
        towards, at = {}, start
        while at not in reached:
            towards[at] = int(torch.multinomial(_distribution(theta[at]), 1, generator=generator))
            at = towards[at]
        at = start
        while at not in reached:
            reached.add(at)
            found[at, towards[at]] = True
            at = towards[at]
    return found if rooted else found | found.mT


def _arborescence(score: dict[tuple[int, int], float], nodes: set[int], root: int) -> dict[int, int] | None:
    """Child -> parent of the best tree of this root: the best parents; where these form a loop, again with it as one node."""
    parents = {}
    for child in nodes - {root}:
        offers = {j: s for (i, j), s in score.items() if i == child}
        if not offers:
            return None
        parents[child] = max(offers, key=lambda j: offers[j])
    loop = _loop(parents)
    if not loop:
        return parents
    one = max(nodes) + 1
    merged: dict[tuple[int, int], float] = {}
    stands_for: dict[tuple[int, int], tuple[int, int]] = {}
    for (i, j), s in score.items():
        if i in loop and j in loop:
            continue
        edge = (one if i in loop else i, one if j in loop else j)
        gain = s - score[i, parents[i]] if i in loop else s
        if gain > merged.get(edge, -math.inf):
            merged[edge], stands_for[edge] = gain, (i, j)
    inner = _arborescence(merged, nodes - loop | {one}, root)
    if inner is None:
        return None
    found = {child: parents[child] for child in loop}
    for edge in inner.items():
        child, parent = stands_for[edge]
        found[child] = parent
    return found


def _loop(parents: dict[int, int]) -> set[int]:
    for start in parents:
        path, at = [], start
        while at in parents and at not in path:
            path.append(at)
            at = parents[at]
        if at in path:
            return set(path[path.index(at) :])
    return set()


def _eliminated(theta: Tensor, real: Tensor | None) -> tuple[Float[Tensor, "*sets"], Float[Tensor, "*sets nodes"]]:
    """The determinant of the Laplacian without its last node, and how much more other nodes weigh as roots, in logarithms.

    Nodes go one by one, and those that are left are joined through them: only sums and products, so that nothing cancels and
    nothing is too small.
    """
    if real is None:
        real = torch.ones(theta.shape[:-1], dtype=torch.bool, device=theta.device)
    # what is no node goes first and joins nothing
    order = real.to(torch.uint8).argsort(dim=-1, stable=True)
    real = real.gather(-1, order)
    left = theta.gather(-2, order.unsqueeze(-1).expand_as(theta)).gather(-1, order.unsqueeze(-2).expand_as(theta))
    left = left.masked_fill(~(real.unsqueeze(-1) & real.unsqueeze(-2)), NOTHING).clamp(min=NOTHING)
    total, gone = torch.zeros_like(theta[..., 0, 0]), []
    for i in range(theta.shape[-1] - 1):
        given, taken = left[..., 0, 1:], left[..., 1:, 0]
        out = given.logsumexp(-1)
        there = real[..., i]
        if bool((there & (out < NOTHING / 2)).any()):
            raise InputError("f: no tree joins all nodes; leave out those that cannot be reached with the mask")
        out = torch.where(there, out, torch.zeros_like(out))
        gone.append((taken, out))
        through = taken.unsqueeze(-1) + given.unsqueeze(-2) - out[..., None, None]
        loops = torch.eye(given.shape[-1], dtype=torch.bool, device=theta.device)
        left = log_add(left[..., 1:, 1:], through.clamp(min=NOTHING)).masked_fill(loops, NOTHING)
        total = total + out
    roots = torch.zeros_like(theta[..., :1, 0])
    for taken, out in reversed(gone):
        weight = (roots + taken).clamp(min=NOTHING).logsumexp(-1, keepdim=True) - out.unsqueeze(-1)
        roots = torch.cat([weight, roots], -1)
    roots = roots.masked_fill(~real, NOTHING)
    return total, torch.zeros_like(roots).scatter(-1, order, roots)


def _distribution(theta: Tensor) -> Tensor:
    """Weights of a row, the largest 1."""
    return (theta - theta.amax()).exp()
