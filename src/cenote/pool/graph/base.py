"""What every graph pool is: the manners of PyTorch Geometric, one vector per graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.graphs import Graphs, check_edges
from cenote.core.requirements import require_dtype_of, require_floating
from cenote.core.segments import accumulation_dtype
from cenote.pool.graph.precision import in_double
from cenote.pool.traits import Traits

Nodes = Float[Tensor, "nodes dim"] | Graphs
Edges = Int[Tensor, "2 edges"] | None
Attr = Shaped[Tensor, "edges *channels"] | None
Batch = Int[Tensor, "nodes"] | None


class GraphLevel(NamedTuple):
    """One step of a hierarchy: how the nodes of a level became those of the next.

    Attributes:
        assignment: for each node the node of the next level that it went into, -1 where it was dropped.
        edge_index: edges of the next level.
        batch: the graph of each node of the next level.
        scores: of each node of the next level, as the method scores.
        counts: how many scores each of them is the mean of; `None` where the method does not count.
        edge_attr: of the edges of the next level, where the method carries them along.
    """

    assignment: Int[Tensor, "nodes"]
    edge_index: Int[Tensor, "2 new_edges"]
    batch: Int[Tensor, "clusters"]
    scores: Float[Tensor, "clusters"]
    counts: Int[Tensor, "clusters"] | None = None
    edge_attr: Shaped[Tensor, "new_edges *channels"] | None = None


class GraphPooled(NamedTuple):
    """Pooled graphs and how they were pooled.

    Attributes:
        output: `[graphs, out_dim]`.
        weights: what each output took from each node, `[heads, nodes]`; `None` where the method has no such numbers.
        levels: of the hierarchy, from the nodes up; empty where there is none.
    """

    output: Float[Tensor, "graphs out_dim"]
    weights: Float[Tensor, "heads nodes"] | None
    levels: tuple[GraphLevel, ...]


class Graph(NamedTuple):
    """A checked batch of graphs."""

    x: Float[Tensor, "nodes dim"]
    edge_index: Int[Tensor, "2 edges"]
    edge_attr: Shaped[Tensor, "edges *channels"] | None
    batch: Int[Tensor, "nodes"]
    size: int


class GraphPool(Traits, ABC):
    """Base of the pools that map `x, edge_index, edge_attr, batch` to `[graphs, out_dim]`, also of `cenote.core.Graphs`.

    A graph pool defines `pool(graph)` on checked input. A graph without nodes gives zeros.

    Args:
        dim: width of a node.
        out_dim: width of an output vector; default `dim`.

    Attributes:
        reads_edges: whether the output depends on the edges.
        discrete: whether the pool makes choices (which nodes join, which stay), which rounding can turn over.
        precise: whether it computes in float64, so that rounding does not; its output has the precision of `x`.

    The others are those of `cenote.pool.traits.Traits`.
    """

    method_kind: ClassVar[str] = "graphs"

    reads_edges: ClassVar[bool] = True
    discrete: ClassVar[bool] = False
    precise: bool = False
    prefix = "keep"

    def forward(
        self, x: Nodes, edge_index: Edges = None, edge_attr: Attr = None, batch: Batch = None, size: int | None = None
    ) -> Float[Tensor, "graphs out_dim"]:
        """Pool each graph to one vector.

        Args:
            x: node features, or `Graphs`, which hold all the rest.
            edge_index: an undirected edge stands in both directions.
            edge_attr: what is known of each edge.
            batch: the graph of each node, not falling; default: all nodes are of one graph.
            size: number of graphs; default `batch.max() + 1`.
        """
        return self._pooled(as_graph(x, edge_index, edge_attr, batch, size, self.dim)).output

    def attend(
        self, x: Nodes, edge_index: Edges = None, edge_attr: Attr = None, batch: Batch = None, size: int | None = None
    ) -> GraphPooled:
        """As calling the pool, and also how the nodes were pooled."""
        return self._pooled(as_graph(x, edge_index, edge_attr, batch, size, self.dim))

    @abstractmethod
    def pool(self, graph: Graph) -> GraphPooled:
        """Pool a checked batch of graphs."""

    def _pooled(self, graph: Graph) -> GraphPooled:
        if not self.precise:
            require_dtype_of(self, graph.x)
        pooled: GraphPooled = in_double(self, self.pool, graph) if self.precise else self.pool(graph)
        empty = graph.batch.bincount(minlength=graph.size) == 0
        return pooled._replace(output=pooled.output.masked_fill(empty.unsqueeze(1), 0))


class GraphClassifier(nn.Module):
    """Logits of each graph: a predictor on what a graph pool gives.

    Args:
        pool: the pool.
        predictor: `[graphs, pool.out_dim] -> [graphs, outputs]`.
    """

    def __init__(self, pool: GraphPool, predictor: nn.Module) -> None:
        super().__init__()
        self.pool: Any = pool
        self.predictor = predictor

    def forward(
        self, x: Nodes, edge_index: Edges = None, edge_attr: Attr = None, batch: Batch = None, size: int | None = None
    ) -> Float[Tensor, "graphs outputs"]:
        """Logits of each graph; arguments as of the pool."""
        return self.predictor(self.pool(x, edge_index, edge_attr, batch, size))


def as_graph(
    x: Nodes,
    edge_index: Edges,
    edge_attr: Attr = None,
    batch: Batch = None,
    size: int | None = None,
    dim: int | None = None,
) -> Graph:
    """Check a graph pool's input and give it the common form.

    Raises:
        InputError: naming the argument, what came and what was expected.
    """
    if isinstance(x, Graphs):
        if any(given is not None for given in (edge_index, edge_attr, batch, size)):
            raise InputError("edge_index, edge_attr, batch, size: Graphs hold them already; leave them out")
        graph = Graph(x.values, x.edge_index, x.edge_attr, x.set_index(), x.batch)
        _check_features(graph.x, dim)
        return graph
    _check_features(x, dim)
    if edge_index is None:
        raise InputError("edge_index: is missing; a graph without edges has torch.empty(2, 0, dtype=torch.int64)")
    if batch is None:
        batch = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        size = 1 if size is None else size
    _check_batch(batch, x.shape[0])
    check_edges(edge_index, edge_attr, batch)
    graphs = int(batch[-1]) + 1 if batch.numel() else 0
    if size is not None and size < graphs:
        raise InputError(f"size: {size} is fewer than the {graphs} graphs of batch")
    return Graph(x, edge_index, edge_attr, batch, graphs if size is None else size)


def sum_by(values: Float[Tensor, "rows *channels"], index: Int[Tensor, "rows"], count: int) -> Tensor:
    """`y_c = sum of the rows with index c`; half precision is summed in float32."""
    wide = accumulation_dtype(values.dtype)
    return values.new_zeros(count, *values.shape[1:], dtype=wide).index_add(0, index, values.to(wide)).to(values.dtype)


def mean_by(values: Float[Tensor, "rows *channels"], index: Int[Tensor, "rows"], count: int) -> Tensor:
    """`y_c = mean of the rows with index c`, zeros where there are none."""
    wide = values.to(accumulation_dtype(values.dtype))
    rows = index.bincount(minlength=count).clamp(min=1).to(wide.dtype)
    return (sum_by(wide, index, count) / rows.view(-1, *[1] * (values.dim() - 1))).to(values.dtype)


def _check_features(x: Tensor, dim: int | None) -> None:
    if not isinstance(x, Tensor) or x.dim() != 2:
        came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x: expected a tensor [nodes, dim] or cenote.core.Graphs, got {came}")
    require_floating(x)
    if dim is not None and x.shape[1] != dim:
        raise InputError(f"x: expected nodes of width {dim}, got {x.shape[1]}; build the pool with dim={x.shape[1]}")


def _check_batch(batch: Tensor, nodes: int) -> None:
    if not isinstance(batch, Tensor) or batch.dtype != torch.int64:
        came = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise InputError(f"batch: expected an int64 tensor [nodes], got {came}; use batch.long()")
    if batch.shape != (nodes,):
        raise InputError(f"batch: expected one number for each of {nodes} nodes, got shape {tuple(batch.shape)}")
    if torch.compiler.is_compiling() or not nodes:
        return
    if int(batch[0]) < 0 or bool((batch.diff() < 0).any()):
        raise InputError("batch: expected graph numbers from 0 that do not fall; sort the nodes by their graph")
