"""Graph Parsing Networks: pooling whose depth and sizes follow from each graph.

Source: Song, Huang, Wang, Lin, "Graph Parsing Networks", ICLR 2024.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.graphs import undirected
from cenote.core.requirements import require_one_of
from cenote.pool.graph.base import (
    Attr,
    Batch,
    Edges,
    Graph,
    GraphClassifier,
    GraphLevel,
    GraphPool,
    GraphPooled,
    Nodes,
    as_graph,
    mean_by,
    sum_by,
)
from cenote.pool.graph.graph_parsing_networks.parsing import EdgeScores, has_edges, parse
from cenote.pool.graph.layers import Conv, GraphBlock, ResidualMLP, mlp
from cenote.pool.graph.precision import in_double

Readout = Literal["last", "levels"]


class Step(NamedTuple):
    """A level and what unpooling needs of it: the features and edges that it started from, and who took part."""

    level: GraphLevel
    h: Float[Tensor, "nodes hidden"]
    edge_index: Int[Tensor, "2 edges"]
    moving: Bool[Tensor, "nodes"]


class GraphParsingPool(GraphPool):
    """Parses each graph into communities, pools them, and goes on until one node per component is left.

    Per level, with node features `h` and edges `A`:
    `g = LayerNorm(h + GNN(h, A))`; `s_uv = sigmoid(MLP(g_u * g_v))`; every node joins its best neighbour (`parse`);
    `h'_c = post(sum_{u in c} pre(g_u)) * kappa_c * n_c` for each community `c`, with `kappa_c` the mean score of the `n_c`
    directed edges inside. Communities with an edge between them are joined. At the end the nodes of a graph are summed.

    Args:
        dim: width of a node.
        hidden: width inside, and of the output.
        gnn_layers: convolutions per level; one set of parameters serves all levels.
        second_gnn: convolutions of a second GNN whose output is pooled instead of `g`; `None`: `g` serves both.
        deepset_layers: of `pre` and `post`.
        parse_layers: of the edge perceptron.
        input_layers: of the perceptron from `dim` to `hidden`.
        dropout: inside all networks.
        edge_dropout: share of edges hidden from the parser in training.
        self_loops: whether a node may choose itself.
        activate_last: whether the last layer of each network is activated too.
        conv: `"gcn"`, `"gat"`, `"gin"`, or a function from a width to a layer `(x, edge_index)`.
        encoder: instead of the input perceptron, a module `(x, edge_index, edge_attr) -> [nodes, hidden]`; with it `dim` is
            what `x` has, and `edge_index` reaches it as given. For molecules: bond-aware convolutions.
        readout: `"last"`: the sum over the nodes that are left; `"levels"`: the sum over the levels of the means over a graph's
            nodes, as the authors do for molecules.
        precise: whether to compute in float64, so that which nodes join does not turn with rounding: not with who else is in
            the batch, nor on a graphics card from call to call. `False`: in the precision of `x`, for half the memory.

    Raises:
        InputError: where an option is none of its values, or PyTorch Geometric is missing.

    Example:
        >>> pool = GraphParsingPool(4, hidden=8)
        >>> ring = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
        >>> pool(torch.randn(6, 4), ring).shape
        torch.Size([1, 8])

    Source: Song et al., "Graph Parsing Networks", ICLR 2024. Defaults: the authors' for PROTEINS.

    Note:
        A node whose component is finished (it has no neighbour) is left alone from then on, so that a graph does not depend
        on its batch mates. The authors send it through GNN and perceptrons again at each level of the longest graph of the
        batch, unless it is the only node of its graph. Edges are taken as undirected, without loops and repeats.
    """

    discrete = True

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        gnn_layers: int = 3,
        second_gnn: int | None = None,
        deepset_layers: int = 1,
        parse_layers: int = 2,
        input_layers: int = 2,
        dropout: float = 0.1,
        edge_dropout: float = 0.0,
        self_loops: bool = False,
        activate_last: bool = True,
        conv: Conv = "gcn",
        encoder: nn.Module | None = None,
        readout: Readout = "last",
        precise: bool = True,
    ) -> None:
        super().__init__(dim, hidden)
        self.precise = precise
        require_one_of(("last", "levels"), readout=readout)
        self.readout = readout
        self.encoder = encoder
        self.input = mlp(dim, hidden, hidden, input_layers, dropout, activate_last) if encoder is None else None
        self.gnn = GraphBlock(hidden, gnn_layers, dropout, activate_last, conv)
        self.gnn2 = None if second_gnn is None else GraphBlock(hidden, second_gnn, dropout, activate_last, conv)
        self.parser = EdgeScores(hidden, parse_layers, dropout, edge_dropout, self_loops)
        self.pre = ResidualMLP(hidden, deepset_layers, dropout, activate_last)
        self.post = ResidualMLP(hidden, deepset_layers, dropout, activate_last)

    def pool(self, graph: Graph) -> GraphPooled:
        h, steps, levels = self.hierarchy(graph)
        batch = steps[-1].level.batch if steps else graph.batch
        output = sum_by(h, batch, graph.size) if self.readout == "last" else levels
        return GraphPooled(output, None, tuple(s.level for s in steps))

    def hierarchy(
        self, graph: Graph
    ) -> tuple[Float[Tensor, "left hidden"], list[Step], Float[Tensor, "graphs hidden"]]:
        """Features of the nodes that are left, the steps that led there, and the readout over levels."""
        batch, edge_index = graph.batch, undirected(graph.edge_index, graph.x.shape[0])
        h = self.encoded(graph)
        levels = mean_by(h, batch, graph.size)
        steps: list[Step] = []
        while edge_index.shape[1]:
            step, merged = self.step(h, edge_index, batch)
            # where all edges were dropped, or every node chose itself
            if step.level.batch.shape == batch.shape:
                break
            steps.append(step)
            changed = batch[step.moving].bincount(minlength=graph.size) > 0
            h, edge_index, batch = merged, step.level.edge_index, step.level.batch
            levels = levels + mean_by(h, batch, graph.size) * changed.unsqueeze(1).to(h.dtype)
        return h, steps, levels

    def step(
        self,
        h: Float[Tensor, "nodes hidden"],
        edge_index: Int[Tensor, "2 edges"],
        batch: Int[Tensor, "nodes"],
    ) -> tuple[Step, Float[Tensor, "communities hidden"]]:
        """One level: what joined, and the features of the communities."""
        g = self.gnn(h, edge_index)
        scores, scored = self.parser(g, edge_index)
        level = parse(scores, scored, batch)
        moving = self.unfinished(edge_index, batch, level)
        communities = level.batch.shape[0]
        pooled = g if self.gnn2 is None else self.gnn2(h, edge_index)
        merged = self.post(sum_by(self.pre(pooled), level.assignment, communities))
        assert level.counts is not None
        # the choices have no gradient; this factor takes it to the parser
        merged = merged * (level.scores * level.counts.to(h.dtype)).unsqueeze(1)
        merged = merged.index_copy(0, level.assignment[~moving], h[~moving])
        return Step(level, h, edge_index, moving), merged

    def unfinished(
        self, edge_index: Int[Tensor, "2 edges"], batch: Int[Tensor, "nodes"], level: GraphLevel
    ) -> Bool[Tensor, "nodes"]:
        """The nodes that have something to join, in graphs of which something joined at this level."""
        # a graph of which every node chose itself is done, whatever its batch mates still do
        joins = level.batch.bincount(minlength=int(batch.max()) + 1) < batch.bincount()
        return has_edges(edge_index, batch.shape[0]) & joins[batch]

    def encoded(self, graph: Graph) -> Float[Tensor, "nodes hidden"]:
        """The nodes at width `hidden`."""
        if self.input is not None:
            return self.input(graph.x)
        assert self.encoder is not None
        return self.encoder(graph.x, graph.edge_index, graph.edge_attr)


class GraphParsingNetwork(GraphClassifier):
    """Classifies graphs: a `GraphParsingPool` and a perceptron.

    Args:
        pool: the hierarchy.
        outputs: number of logits.
        layers: of the perceptron.
        dropout: inside it.

    Example:
        >>> model = GraphParsingNetwork(GraphParsingPool(4, hidden=8), outputs=2)
        >>> model(torch.randn(3, 4), torch.tensor([[0, 1], [1, 0]]), batch=torch.tensor([0, 0, 1])).shape
        torch.Size([2, 2])

    Source: Song et al., "Graph Parsing Networks", ICLR 2024.
    """

    def __init__(self, pool: GraphParsingPool, outputs: int, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__(pool, mlp(pool.out_dim, pool.out_dim, outputs, layers, dropout, activate_last=False))


class GraphParsingNodes(nn.Module):
    """Classifies nodes: parses, then unpools level by level.

    Backwards over the levels: `h <- LayerNorm(h' + GNN3(h', A))` with `h' = S (h / n) + h_level`, where `S` gives each node the
    features of its community, `n` is the number of directed edges inside it and `h_level` are the features that the level
    started from. A perceptron then reads each node.

    Args:
        pool: the hierarchy; its readout is not used.
        outputs: number of logits per node.
        third_gnn: convolutions of the GNN on the way down; `None`: the one on the way up (its second, if it has one).
        layers: of the perceptron.
        dropout: inside the third GNN and the perceptron.
        conv, activate_last: of the third GNN, as of the pool.

    Example:
        >>> model = GraphParsingNodes(GraphParsingPool(4, hidden=8), outputs=3)
        >>> model(torch.randn(6, 4), torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])).shape
        torch.Size([6, 3])

    Source: Song et al., "Graph Parsing Networks", ICLR 2024.

    Note:
        As on the way up, a node whose component is finished is left alone at the levels above.
    """

    def __init__(
        self,
        pool: GraphParsingPool,
        outputs: int,
        third_gnn: int | None = None,
        layers: int = 2,
        dropout: float = 0.1,
        conv: Conv = "gcn",
        activate_last: bool = True,
    ) -> None:
        super().__init__()
        self.pool = pool
        hidden = pool.out_dim
        self.gnn3 = None if third_gnn is None else GraphBlock(hidden, third_gnn, dropout, activate_last, conv)
        self.predictor = mlp(hidden, hidden, outputs, layers, dropout, activate_last=False)

    def forward(
        self, x: Nodes, edge_index: Edges = None, edge_attr: Attr = None, batch: Batch = None
    ) -> Float[Tensor, "nodes outputs"]:
        """Logits of each node."""
        graph = as_graph(x, edge_index, edge_attr, batch, dim=self.pool.dim)
        logits: Tensor = in_double(self, self._logits, graph) if self.pool.precise else self._logits(graph)
        return logits

    def _logits(self, graph: Graph) -> Float[Tensor, "nodes outputs"]:
        h, steps, _ = self.pool.hierarchy(graph)
        return self.predictor(self.unpool(h, steps))

    def unpool(self, h: Float[Tensor, "left hidden"], steps: list[Step]) -> Float[Tensor, "nodes hidden"]:
        """From the nodes that are left back to all nodes."""
        gnn = self.gnn3 or self.pool.gnn2 or self.pool.gnn
        for level, start, edge_index, moving in reversed(steps):
            assert level.counts is not None
            spread = h[level.assignment]
            down = spread / level.counts[level.assignment].to(h.dtype).unsqueeze(1) + start
            h = torch.where(moving.unsqueeze(1), gnn(down, edge_index), spread)
        return h
