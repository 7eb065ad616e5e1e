"""The small networks of Graph Parsing Networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.pool.graph.geometric import geometric

Conv = Literal["gcn", "gat", "gin"] | Callable[[int], nn.Module]


def mlp(
    dim: int, hidden: int, out_dim: int, layers: int, dropout: float, activate_last: bool, norm: bool = True
) -> nn.Sequential:
    """Linear, LayerNorm (where `norm`), ReLU, Dropout, repeated; a single layer is the Linear alone."""
    if layers == 1:
        return nn.Sequential(nn.Linear(dim, out_dim))
    parts: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        width = out_dim if last else hidden
        parts.append(nn.Linear(hidden if i else dim, width))
        if not last or activate_last:
            parts += [nn.LayerNorm(width)] if norm else []
            parts += [nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*parts)


class ResidualMLP(nn.Module):
    """`LayerNorm(x + MLP(x))`; with no layer, `x` itself."""

    def __init__(self, dim: int, layers: int, dropout: float, activate_last: bool) -> None:
        super().__init__()
        self.mlp = mlp(dim, dim, dim, layers, dropout, activate_last, norm=False)
        self.norm = nn.LayerNorm(dim) if layers else nn.Identity()

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return self.norm(x + self.mlp(x)) if len(self.mlp) else x


class GraphBlock(nn.Module):
    """`LayerNorm(x + GNN(x, A))`, the GNN a row of convolutions with ReLU and Dropout; with no layer, `x` itself."""

    def __init__(self, dim: int, layers: int, dropout: float, activate_last: bool, conv: Conv = "gcn") -> None:
        super().__init__()
        self.convs = nn.ModuleList([_conv(conv, dim) for _ in range(layers)])
        self.activated = layers if activate_last else layers - 1
        self.activation = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(dim) if layers else nn.Identity()

    def forward(self, x: Float[Tensor, "nodes dim"], edge_index: Int[Tensor, "2 edges"]) -> Float[Tensor, "nodes dim"]:
        h = x
        for i, conv in enumerate(self.convs):
            h = conv(h, edge_index)
            h = self.activation(h) if i < self.activated else h
        return self.norm(x + h) if len(self.convs) else x


def _conv(conv: Conv, dim: int) -> nn.Module:
    if callable(conv):
        return conv(dim)
    if conv == "gcn":
        return geometric().GCNConv(dim, dim)
    if conv == "gat":
        return geometric().GATConv(dim, dim)
    if conv == "gin":
        return geometric().GINConv(nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU()))
    raise InputError(f"conv: expected 'gcn', 'gat', 'gin' or a function that builds a layer of a width, got {conv!r}")
