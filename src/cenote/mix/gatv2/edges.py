"""Sums and softmax over the edges that lead to a node, and loops."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cenote.core.segments import accumulation_dtype


def sum_at(
    values: Float[Tensor, "edges *channels"], target: Int[Tensor, "edges"], nodes: int
) -> Float[Tensor, "nodes *channels"]:
    """`y_i = sum of the rows with target i`; half precision is summed in float32."""
    wide = accumulation_dtype(values.dtype)
    total = values.new_zeros(nodes, *values.shape[1:], dtype=wide)
    return total.index_add(0, target, values.to(wide)).to(values.dtype)


def softmax_at(
    scores: Float[Tensor, "edges heads"], target: Int[Tensor, "edges"], nodes: int
) -> Float[Tensor, "edges heads"]:
    """Weights of the edges that lead to a node, which sum to 1; the largest score of each node is taken off first.

    Half precision goes through float32.

    >>> softmax_at(torch.tensor([[0.0], [0.0], [5.0]]), torch.tensor([0, 0, 1]), 3).flatten().tolist()
    [0.5, 0.5, 1.0]
    """
    wide = scores.to(accumulation_dtype(scores.dtype))
    low = wide.new_full((nodes, wide.shape[1]), torch.finfo(wide.dtype).min)
    top = low.scatter_reduce(0, target.unsqueeze(1).expand_as(wide), wide.detach(), "amax")
    powers = (wide - top[target]).exp()
    # not below the largest power, which is 1
    return (powers / sum_at(powers, target, nodes)[target]).to(scores.dtype)


def with_loops(
    edge_index: Int[Tensor, "2 edges"], nodes: int, edge_attr: Shaped[Tensor, "edges channels"] | None = None
) -> tuple[Int[Tensor, "2 looped"], Shaped[Tensor, "looped channels"] | None]:
    """The edges with one loop at each node, behind all others; loops that were there are taken away.

    Args:
        edge_index: row 0 the source, row 1 the target.
        nodes: their number.
        edge_attr: of the edges; a loop gets the mean of those that lead to its node, 0 where none does.

    Example:
        >>> with_loops(torch.tensor([[0, 1], [1, 1]]), 2)[0].tolist()
        [[0, 0, 1], [1, 0, 1]]
    """
    kept = edge_index[0] != edge_index[1]
    edges = edge_index[:, kept]
    loops = torch.arange(nodes, device=edges.device).expand(2, -1)
    if edge_attr is not None:
        attr = edge_attr[kept]
        count = edges[1].bincount(minlength=nodes).clamp(min=1).to(attr.dtype)
        edge_attr = torch.cat([attr, sum_at(attr, edges[1], nodes) / count.unsqueeze(1)])
    return torch.cat([edges, loops], 1), edge_attr
