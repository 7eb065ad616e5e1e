"""A ragged batch of graphs: the nodes are tokens, and edges join nodes of one graph."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.segments import segment_index
from cenote.core.sets import Bags


class Graphs(Bags):
    """`Bags` whose tokens are nodes, and the edges between them.

    What takes `Bags` sees the nodes alone; a graph pool sees the edges too.

    Args:
        values: `[nodes, dim]`, the nodes of graph 0, then of graph 1, and so on.
        offsets: `[graphs + 1]` int64, as of `Bags`.
        edge_index: `[2, edges]` int64, rows of `values`; an undirected edge stands in both directions.
        edge_attr: `[edges, channels]` or `[edges]`, what is known of each edge.

    Raises:
        InputError: where the offsets do not describe the values, or an edge joins two graphs or a node that there is not.

    Example:
        >>> two = Graphs(torch.eye(3), torch.tensor([0, 2, 3]), torch.tensor([[0, 1], [1, 0]]))
        >>> two.select(torch.tensor([1, 0])).edge_index.tolist()
        [[1, 2], [2, 1]]
    """

    def __init__(
        self,
        values: Float[Tensor, "nodes dim"],
        offsets: Int[Tensor, "graphs_plus_1"],
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Shaped[Tensor, "edges *channels"] | None = None,
    ) -> None:
        super().__init__(values, offsets)
        check_edges(edge_index, edge_attr, self.set_index())
        owner = self.set_index()[edge_index[0]]
        if bool((owner.diff() < 0).any()):
            owner, order = torch.sort(owner, stable=True)
            edge_index = edge_index[:, order]
            edge_attr = None if edge_attr is None else edge_attr[order]
        self.edge_index = edge_index
        self.edge_attr = edge_attr
        self._edge_offsets = torch.nn.functional.pad(owner.bincount(minlength=self.batch).cumsum(0), (1, 0))

    def edges(self) -> Int[Tensor, "graphs"]:
        """Number of stored edges of each graph; an undirected one counts twice."""
        return self._edge_offsets.diff()

    def select(self, sets: Int[Tensor, "chosen"] | Bool[Tensor, "graphs"]) -> Graphs:
        """The graphs with these numbers, in this order, or those marked True, with their edges."""
        bags = super().select(sets)
        counts = self.edges()[sets]
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        total = int(starts[-1])
        owner = segment_index(starts, total)
        rows = torch.arange(total, device=owner.device) + (self._edge_offsets[:-1][sets] - starts[:-1])[owner]
        shift = (bags.offsets[:-1] - self.offsets[:-1][sets])[owner]
        attr = None if self.edge_attr is None else self.edge_attr[rows]
        return Graphs(bags.values, bags.offsets, self.edge_index[:, rows] + shift, attr)

    def to(self, *args: object, **kwargs: object) -> Graphs:
        """As `torch.Tensor.to`: another device or dtype (the edges keep theirs)."""
        bags = super().to(*args, **kwargs)
        device = bags.values.device
        attr = None if self.edge_attr is None else self.edge_attr.to(device)
        return Graphs(bags.values, bags.offsets, self.edge_index.to(device), attr)

    def replace(self, values: Float[Tensor, "nodes channels"]) -> Graphs:
        return Graphs(values, self.offsets, self.edge_index, self.edge_attr)

    def __repr__(self) -> str:
        return (
            f"Graphs(batch={self.batch}, nodes={self.values.shape[0]}, edges={self.edge_index.shape[1]}, "
            f"dim={self.dim}, dtype={self.values.dtype})"
        )


def check_edges(edge_index: Tensor, edge_attr: Tensor | None, batch: Int[Tensor, "nodes"]) -> None:
    """Every edge joins two nodes of one graph.

    Args:
        edge_index: to be `[2, edges]` int64.
        edge_attr: to have a row per edge.
        batch: the graph of each node.

    Raises:
        InputError: naming the argument, what came and what was expected.
    """
    if not isinstance(edge_index, Tensor) or edge_index.dtype != torch.int64:
        came = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise InputError(f"edge_index: expected an int64 tensor [2, edges], got {came}; use edge_index.long()")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise InputError(f"edge_index: expected [2, edges], got shape {tuple(edge_index.shape)}")
    nodes = batch.shape[0]
    if edge_attr is not None and (not isinstance(edge_attr, Tensor) or edge_attr.shape[:1] != edge_index.shape[1:]):
        what = tuple(edge_attr.shape) if isinstance(edge_attr, Tensor) else type(edge_attr).__name__
        raise InputError(f"edge_attr: expected one row for each of {edge_index.shape[1]} edges, got {what}")
    if torch.compiler.is_compiling() or not edge_index.numel():
        return
    low, high = int(edge_index.min()), int(edge_index.max())
    if low < 0 or high >= nodes:
        raise InputError(f"edge_index: expected nodes from 0 to {nodes - 1}, got {low if low < 0 else high}")
    apart = batch[edge_index[0]] != batch[edge_index[1]]
    if bool(apart.any()):
        e = int(apart.nonzero()[0])
        u, v = edge_index[:, e].tolist()
        raise InputError(
            f"edge_index: edge {e} joins node {u} of graph {int(batch[u])} with node {v} of graph {int(batch[v])}; "
            f"an edge stays inside its graph"
        )


def undirected(edge_index: Int[Tensor, "2 edges"], nodes: int) -> Int[Tensor, "2 both_ways"]:
    """Every edge once in each direction, without loops and repeats, sorted.

    >>> undirected(torch.tensor([[2, 0, 1], [1, 0, 2]]), 3).tolist()
    [[1, 2], [2, 1]]
    """
    row, col = edge_index[:, edge_index[0] != edge_index[1]]
    keys = torch.cat([row * nodes + col, col * nodes + row]).unique()
    return torch.stack([keys // max(nodes, 1), keys % max(nodes, 1)])
