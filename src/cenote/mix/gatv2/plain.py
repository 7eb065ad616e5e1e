"""Layers of graphs without attention, that others are compared with."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.graphs import check_edges
from cenote.core.requirements import require_at_least
from cenote.mix.gatv2.conv import start_glorot
from cenote.mix.gatv2.edges import sum_at, with_loops


class _Plain(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        require_at_least(1, dim=dim, out_dim=out_dim)
        self.dim, self.out_dim = dim, out_dim

    def checked(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None) -> None:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise InputError(f"x: expected nodes [nodes, {self.dim}], got {list(x.shape)}")
        if edge_attr is not None:
            raise InputError(f"edge_attr: {type(self).__name__} has no place for features of edges; leave them out")
        check_edges(edge_index, None, torch.zeros(len(x), dtype=torch.long, device=x.device))


class GCNConv(_Plain):
    """`y = D^-1/2 (A + I) D^-1/2 x W + b`.

    Args:
        dim: width of a node.
        out_dim: width of the result.

    Source:
        Kipf and Welling 2017, arXiv 1609.02907.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim)
        self.lin = nn.Linear(dim, out_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_dim))
        start_glorot(self)

    def forward(
        self,
        x: Float[Tensor, "nodes dim"],
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Tensor | None = None,
    ) -> Float[Tensor, "nodes out"]:
        """Mix the nodes along the edges, row 0 the source, row 1 the target."""
        self.checked(x, edge_index, edge_attr)
        (source, target), _ = with_loops(edge_index, len(x))
        scale = target.bincount(minlength=len(x)).to(x.dtype).rsqrt()
        h = self.lin(x) * scale.unsqueeze(1)
        return sum_at(h[source], target, len(x)) * scale.unsqueeze(1) + self.bias


class GINConv(_Plain):
    """`y_i = MLP((1 + e) x_i + sum_j x_j)` with a learned `e`.

    Args:
        dim: width of a node.
        out_dim: width of the result, and of the perceptron's hidden layer.

    Source:
        Xu et al. 2019, arXiv 1810.00826.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim)
        self.mlp = nn.Sequential(nn.Linear(dim, out_dim), nn.ReLU(), nn.Linear(out_dim, out_dim))
        self.eps = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Float[Tensor, "nodes dim"],
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Tensor | None = None,
    ) -> Float[Tensor, "nodes out"]:
        """Mix the nodes along the edges, row 0 the source, row 1 the target."""
        self.checked(x, edge_index, edge_attr)
        source, target = edge_index
        return self.mlp((1 + self.eps) * x + sum_at(x[source], target, len(x)))
