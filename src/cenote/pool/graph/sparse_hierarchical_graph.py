"""Sparse hierarchical graph classifiers: convolve, keep the best nodes, read out, three times.

Source: Cangea, Velickovic, Jovanovic, Kipf, Lio, "Towards Sparse Hierarchical Graph Classifiers", NeurIPS workshop R2L 2018.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.pool.graph.base import Graph, GraphClassifier, GraphLevel, GraphPool, GraphPooled, mean_by
from cenote.pool.graph.geometric import geometric
from cenote.pool.graph.precision import ranks

Gate = Literal["tanh", "sigmoid"]
GATES: dict[str, Any] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


class MeanConv(nn.Module):
    """`ReLU(D^-1 A x Theta + x Theta')` with `A` the edges and a loop at each node, `D` its degrees.

    Called with weights of the edges, `A` holds these, a loop weighing 1, and `D` the sums of its rows.

    Args:
        dim: width of a node.
        out_dim: width of the result.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = geometric().SAGEConv(dim, out_dim, aggr="mean")

    def forward(
        self,
        x: Float[Tensor, "nodes dim"],
        edge_index: Int[Tensor, "2 edges"],
        edge_weight: Float[Tensor, "edges"] | None = None,
    ) -> Float[Tensor, "nodes out"]:
        looped, weight = geometric("utils").add_remaining_self_loops(edge_index, edge_weight, 1.0, x.shape[0])
        if weight is None:
            return torch.relu(self.conv(x, looped))
        source, target = looped
        degrees = x.new_zeros(len(x)).index_add(0, target, weight)
        total = torch.zeros_like(x).index_add(0, target, weight.unsqueeze(1) * x[source])
        mean = total / degrees.clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(1)
        return torch.relu(self.conv.lin_l(mean) + self.conv.lin_r(x))


class TopK(nn.Module):
    """Keeps the nodes with the largest projections, gated by them, and the edges between kept nodes.

    `y = x p / |p|`; the `ceil(ratio n)` nodes with the largest `y` of each graph stay, in falling order; `x' = x * gate(y)`.

    Args:
        dim: width of a node.
        ratio: share of the nodes that stay, above 0 to 1; 1 keeps all of them.
        k: number of the nodes that stay, instead of `ratio`; a smaller graph keeps all.
        gate: `"tanh"` or `"sigmoid"`. Without one `p` would have no gradient.
        min_score: instead, keep the nodes whose softmax over their graph, the gate here, is above
            `min(min_score, max - 1e-7)`.

    Raises:
        InputError: where an argument is out of range, or PyTorch Geometric is missing.

    Note:
        Parameters and edges are those of PyTorch Geometric's `TopKPooling`, where a ratio of 1 means one node. Nodes are ranked
        by the projection itself, and nodes that are equal to rounding by their number: large projections have the same tanh in
        float32, and equal nodes must not be chosen by who else is in the batch.
    """

    def __init__(
        self,
        dim: int,
        ratio: float = 0.8,
        k: int | None = None,
        gate: Gate = "tanh",
        min_score: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise InputError(f"ratio: expected a share of the nodes, above 0 to 1, got {ratio}; for a number give k")
        if k is not None and k < 1:
            raise InputError(f"k: expected at least one node to keep, got {k}")
        require_one_of(GATES, gate=gate)
        self.ratio = ratio
        self.k = k
        self.gate = gate
        self.min_score = min_score
        self.pooling = geometric().TopKPooling(dim, ratio, min_score=min_score)

    def forward(self, graph: Graph) -> tuple[Float[Tensor, "kept dim"], GraphLevel]:
        """Features of the kept nodes, and the level; its scores are the gates."""
        x, edge_index, edge_attr, batch, size = graph
        if self.min_score is not None:
            kept, gate = self._above_min_score(x, batch)
        else:
            p = nn.functional.normalize(self.pooling.select.weight, dim=-1)
            y = (x * p).sum(-1)
            kept = self._largest(y.detach(), batch, size)
            gate = GATES[self.gate](y[kept])
        order = batch[kept].argsort(stable=True)
        kept, gate = kept[order], gate[order]
        assignment = torch.full_like(batch, -1)
        assignment[kept] = torch.arange(kept.shape[0], device=kept.device)
        ends = assignment[edge_index]
        stays = (ends >= 0).all(0)
        attr = None if edge_attr is None else edge_attr[stays]
        return x[kept] * gate.unsqueeze(1), GraphLevel(assignment, ends[:, stays], batch[kept], gate, edge_attr=attr)

    def _largest(self, y: Float[Tensor, "nodes"], batch: Int[Tensor, "nodes"], size: int) -> Int[Tensor, "kept"]:
        order = ranks(y, batch).argsort(descending=True, stable=True)
        order = order[batch[order].argsort(stable=True)]
        nodes = batch.bincount(minlength=size)
        rank = torch.arange(order.shape[0], device=y.device) - (nodes.cumsum(0) - nodes)[batch]
        # in double: a float32 product may land just above a whole number
        keep = (self.ratio * nodes.double() - 1e-9).ceil().long() if self.k is None else torch.full_like(nodes, self.k)
        return order[rank < keep[batch]]

    def _above_min_score(
        self, x: Float[Tensor, "nodes dim"], batch: Int[Tensor, "nodes"]
    ) -> tuple[Int[Tensor, "kept"], Float[Tensor, "kept"]]:
        selected = self.pooling.select(x, batch)
        return selected.node_index, selected.weight


class SparseHierarchicalPool(GraphPool):
    """Convolution, top-k pooling and readout, repeated; the readouts of all blocks are summed.

    `s = sum_l [mean_i x_i^l ; max_i x_i^l]` over the nodes that block `l` keeps of each graph (`MeanConv`, then `TopK`).

    Args:
        dim: width of a node.
        hidden: width of a convolution; the output has twice as many.
        blocks: how many times.
        ratio, k, gate, min_score: of each `TopK`.
        weighted: whether `edge_attr`, one number of 0 or more per edge, weighs the edges in the convolutions.
        precise: whether to compute in float64, so that which nodes stay does not turn with rounding: not with who else is in
            the batch, nor on a graphics card from call to call. `False`: in the precision of `x`, for half the memory.

    Raises:
        InputError: where an argument is out of range, or PyTorch Geometric is missing.

    Example:
        >>> pool = SparseHierarchicalPool(4, hidden=8)
        >>> y, _, levels = pool.attend(torch.randn(10, 4), torch.tensor([[0, 1], [1, 0]]))
        >>> y.shape, [len(level.scores) for level in levels]
        (torch.Size([1, 16]), [8, 7, 6])

    Source: Cangea et al., "Towards Sparse Hierarchical Graph Classifiers", 2018: three blocks of 128 that keep 0.8.

    Note:
        `edge_attr` is carried along to the levels; the convolution reads it only where `weighted`.
    """

    discrete = True
    weighted: bool = False

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        blocks: int = 3,
        ratio: float = 0.8,
        k: int | None = None,
        gate: Gate = "tanh",
        min_score: float | None = None,
        precise: bool = True,
        weighted: bool = False,
    ) -> None:
        super().__init__(dim, 2 * hidden)
        self.precise = precise
        self.weighted = weighted
        require_at_least(1, blocks=blocks)
        self.convs = nn.ModuleList([MeanConv(hidden if i else dim, hidden) for i in range(blocks)])
        self.pools = nn.ModuleList([TopK(hidden, ratio, k, gate, min_score) for _ in range(blocks)])

    def pool(self, graph: Graph) -> GraphPooled:
        total = graph.x.new_zeros(graph.size, self.out_dim)
        levels: list[GraphLevel] = []
        for conv, top in zip(self.convs, self.pools, strict=True):
            x, level = top(graph._replace(x=conv(graph.x, graph.edge_index, self._weights(graph))))
            graph = Graph(x, level.edge_index, level.edge_attr, level.batch, graph.size)
            total = total + readout(x, level.batch, graph.size)
            levels.append(level)
        return GraphPooled(total, None, tuple(levels))

    def _weights(self, graph: Graph) -> Float[Tensor, "edges"] | None:
        if not self.weighted:
            return None
        attr = graph.edge_attr
        if attr is None or attr.numel() != graph.edge_index.shape[1] or bool((attr < 0).any()):
            raise InputError(
                f"edge_attr: expected one weight of 0 or more for each of {graph.edge_index.shape[1]} edges, got "
                f"{'none' if attr is None else f'shape {tuple(attr.shape)}'}; build with weighted=False to leave it out"
            )
        return attr.flatten().to(graph.x.dtype)


class SparseHierarchicalClassifier(GraphClassifier):
    """Classifies graphs: a `SparseHierarchicalPool` and a perceptron with one hidden layer.

    Args:
        pool: the hierarchy.
        outputs: number of logits.
        hidden: width of the perceptron; default half of what the pool gives.
        dropout: before its last layer.

    Example:
        >>> model = SparseHierarchicalClassifier(SparseHierarchicalPool(4, hidden=8), outputs=3)
        >>> model(torch.randn(5, 4), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([1, 3])

    Source: Cangea et al., "Towards Sparse Hierarchical Graph Classifiers", 2018.

    Note:
        The paper says a perceptron; one hidden layer is our reading of it.
    """

    def __init__(
        self, pool: SparseHierarchicalPool, outputs: int, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        hidden = pool.out_dim // 2 if hidden is None else hidden
        layers = (nn.Linear(pool.out_dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))
        super().__init__(pool, nn.Sequential(*layers))


def readout(x: Float[Tensor, "nodes dim"], batch: Int[Tensor, "nodes"], size: int) -> Float[Tensor, "graphs twice_dim"]:
    """`[mean ; max]` over the nodes of each graph; zeros where there is none."""
    index = batch.unsqueeze(1).expand_as(x)
    top = x.new_zeros(size, x.shape[1]).scatter_reduce(0, index, x, "amax", include_self=False)
    return torch.cat([mean_by(x, batch, size), top], 1)
