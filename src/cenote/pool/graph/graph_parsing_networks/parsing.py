"""Graph parsing: every node joins its best neighbour, and connected groups are the communities."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.graphs import undirected
from cenote.core.requirements import require_at_least, require_rate
from cenote.pool.graph.base import GraphLevel, sum_by
from cenote.pool.graph.layers import mlp
from cenote.pool.graph.precision import ranks


def parse(
    scores: Float[Tensor, "edges"], edge_index: Int[Tensor, "2 edges"], batch: Int[Tensor, "nodes"]
) -> GraphLevel:
    """One parsing step: one Boruvka step of the maximum spanning forest.

    Each node `u` with edges points to `argmax_v s_uv`; communities are the connected components of these pointers, so that
    each step at least halves the nodes that have neighbours. A node without edges is a community of its own.

    Args:
        scores: `s_uv`, equal in both directions. In float64, scores of a graph that are equal to rounding are equal.
        edge_index: both directions of every edge, as `undirected` gives them.
        batch: the graph of each node.

    Returns:
        The level. `scores` is the mean over all directed edges inside a community, `counts` their number; both are 1 for a
        node without edges. Communities are numbered by their first node.

    Example:
        >>> path = undirected(torch.tensor([[0, 1, 2], [1, 2, 3]]), 4)
        >>> parse(torch.tensor([0.9, 0.9, 0.1, 0.1, 0.8, 0.8]), path, torch.zeros(4, dtype=torch.int64)).assignment.tolist()
        [0, 0, 1, 1]

    Note:
        Of equal scores the first edge in the order of `edge_index` counts. The authors grow communities one by one, which for
        equal scores can split what the pointers join; for distinct scores both are the same.
    """
    nodes = batch.shape[0]
    row, col = edge_index
    points_to = _best_neighbour(ranks(scores.detach(), batch[row]), edge_index, nodes)
    # pointers end in a pair that points at each other (or in a loop); an even number of steps stays on one end of it
    end = points_to[points_to]
    while not torch.equal(further := end[end], end):
        end = further
    root = torch.minimum(end, points_to[end])

    every = torch.arange(nodes, device=batch.device)
    first = every.new_full((nodes,), nodes).scatter_reduce(0, root, every, "amin")
    leaders, assignment = first[root].unique(return_inverse=True)
    communities = leaders.shape[0]

    inside = assignment[row] == assignment[col]
    counts = assignment[row[inside]].bincount(minlength=communities)
    total = sum_by(scores[inside], assignment[row[inside]], communities)
    mean = torch.where(counts > 0, total / counts.clamp(min=1), total.new_ones(()))
    new_edges = undirected(assignment[edge_index[:, ~inside]], communities)
    return GraphLevel(assignment, new_edges, batch[leaders], mean.to(scores.dtype), counts.clamp(min=1))


class EdgeScores(nn.Module):
    """The parser's scores: `s_uv = sigmoid(MLP(g_u * g_v))`, one for both directions.

    Args:
        dim: width of a node.
        layers: of the perceptron; each but the last is Linear, LayerNorm, ReLU, Dropout.
        dropout: inside the perceptron.
        edge_dropout: share of the edges that the parser does not see in training.
        self_loops: whether a node may choose itself: loops are scored as well, and count as edges inside.

    Source: Song et al., "Graph Parsing Networks", ICLR 2024.
    """

    def __init__(
        self, dim: int, layers: int = 2, dropout: float = 0.0, edge_dropout: float = 0.0, self_loops: bool = False
    ) -> None:
        super().__init__()
        require_rate(edge_dropout=edge_dropout)
        require_at_least(1, layers=layers)
        self.mlp = mlp(dim, dim, 1, layers, dropout, activate_last=False)
        self.edge_dropout = edge_dropout
        self.self_loops = self_loops

    def forward(
        self, g: Float[Tensor, "nodes dim"], edge_index: Int[Tensor, "2 edges"]
    ) -> tuple[Float[Tensor, "scored"], Int[Tensor, "2 scored"]]:
        """Scores, and the edges that they belong to (without those dropped, with loops where wanted).

        Args:
            g: node features.
            edge_index: both directions of every edge, as `undirected` gives them.
        """
        nodes = g.shape[0]
        up = edge_index[:, edge_index[0] < edge_index[1]]
        if self.training and self.edge_dropout:
            up = up[:, torch.rand(up.shape[1], device=up.device) >= self.edge_dropout]
        if self.self_loops:
            up = torch.cat([up, torch.arange(nodes, device=up.device).expand(2, -1)], 1)
        # each pair once: a product computed for either direction may differ in its last bit
        scores = torch.sigmoid(self.mlp(g[up[0]] * g[up[1]])).squeeze(-1)
        loop = up[0] == up[1]
        both = torch.cat([up, up[:, ~loop].flip(0)], 1)
        scores = torch.cat([scores, scores[~loop]])
        order = (both[0] * nodes + both[1]).argsort()
        return scores[order], both[:, order]


def has_edges(edge_index: Int[Tensor, "2 edges"], nodes: int) -> Bool[Tensor, "nodes"]:
    """Which nodes have a neighbour."""
    return edge_index[0].bincount(minlength=nodes) > 0


def _best_neighbour(
    ranked: Int[Tensor, "edges"], edge_index: Int[Tensor, "2 edges"], nodes: int
) -> Int[Tensor, "nodes"]:
    row, col = edge_index
    top = ranked.new_zeros(nodes).scatter_reduce(0, row, ranked, "amax", include_self=False)
    best = ranked == top[row]
    edges = row.shape[0]
    at = torch.arange(edges, device=row.device)[best]
    first = at.new_full((nodes,), edges).scatter_reduce(0, row[best], at, "amin")
    alone = torch.arange(nodes, device=row.device)
    return torch.where(first < edges, col[first.clamp(max=edges - 1)], alone) if edges else alone
