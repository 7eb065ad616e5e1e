"""Attention over the edges of a graph: GATv2, GAT, and scaled dot products.

Source: Brody, Alon, Yahav, "How Attentive are Graph Attention Networks?", ICLR 2022.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cenote.core.errors import InputError
from cenote.core.graphs import check_edges
from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least, require_dtype_of, require_floating, require_rate
from cenote.mix.gatv2.edges import softmax_at, sum_at, with_loops

Nodes = Float[Tensor, "nodes dim"] | tuple[Float[Tensor, "sources dim"], Float[Tensor, "targets dim_2"]]
AT_ONCE = 1 << 22
"""Numbers that the dense form holds at once."""


class Attended(NamedTuple):
    """What a layer gives.

    Attributes:
        output: of each target.
        edge_index: the edges that were used, loops included; row 0 the source, row 1 the target.
        weights: what each target took along each of these edges, by head.
    """

    output: Float[Tensor, "nodes out"]
    edge_index: Int[Tensor, "2 edges"]
    weights: Float[Tensor, "edges heads"]


class DenseAttended(NamedTuple):
    """What the dense form gives.

    Attributes:
        output: of each query.
        weights: what each query took of each key; zeros where it has no neighbour.
    """

    output: Float[Tensor, "batch queries out"]
    weights: Float[Tensor, "batch heads queries keys"]


class GraphAttention(nn.Module, ABC):
    """Base of the layers that weigh neighbours: `y_i = sum_j a_ij V x_j` by head, `a_ij` a softmax over the edges to `i`.

    A class defines `queries_and_keys`, `scores` and `dense_scores`.

    Args:
        dim: width of a node; of sources and of targets, where they are not the same nodes.
        out_dim: width of a head.
        heads: number of heads.
        join: whether heads are joined, or their mean is taken.
        dropout: on weights, in training.
        loops: whether each node is its own neighbour, once; never between two kinds of nodes.
        edge_dim: width of the features of edges, None for none.
        bias: whether maps of nodes and the output have one.
        residual: whether a linear map of the target is added.

    Raises:
        InputError: where an argument is out of range.
    """

    def __init__(
        self,
        dim: int | tuple[int, int],
        out_dim: int,
        heads: int = 1,
        *,
        join: bool = True,
        dropout: float = 0.0,
        loops: bool = True,
        edge_dim: int | None = None,
        bias: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__()
        source, target = (dim, dim) if isinstance(dim, int) else dim
        require_at_least(1, dim=min(source, target), out_dim=out_dim, heads=heads)
        require_rate(dropout=dropout)
        self.dims, self.heads, self.join, self.dropout, self.loops = (source, target), heads, join, dropout, loops
        self.out_dim = heads * out_dim if join else out_dim
        self.head_dim = out_dim
        self.lin_edge = None if edge_dim is None else nn.Linear(edge_dim, heads * out_dim, bias=False)
        self.res = nn.Linear(target, self.out_dim, bias=False) if residual else None
        self.bias = nn.Parameter(torch.zeros(self.out_dim)) if bias else None

    def forward(
        self,
        x: Nodes,
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Shaped[Tensor, "edges *channels"] | None = None,
    ) -> Float[Tensor, "nodes out"]:
        """Mix the nodes along the edges.

        Args:
            x: the nodes; sources and targets, where they are not the same.
            edge_index: row 0 the source, row 1 the target.
            edge_attr: what is known of each edge.
        """
        return self.attend(x, edge_index, edge_attr).output

    def attend(
        self,
        x: Nodes,
        edge_index: Int[Tensor, "2 edges"],
        edge_attr: Shaped[Tensor, "edges *channels"] | None = None,
    ) -> Attended:
        """As calling the layer, with the weights and the edges that they belong to."""
        sources, targets, edge_index, edge_attr = self._checked(x, edge_index, edge_attr)
        q, k, v = self.projected(sources, targets)
        source, target = edge_index
        edge = None
        if self.lin_edge is not None and edge_attr is not None:
            edge = self.lin_edge(edge_attr.to(v.dtype)).unflatten(-1, (self.heads, -1))
        scores = self.scores(q[target], k[source], edge)
        weights = softmax_at(scores, target, len(targets))
        taken = F.dropout(weights, self.dropout, self.training).unsqueeze(-1) * v[source]
        return Attended(self._out(sum_at(taken, target, len(targets)), targets), edge_index, weights)

    def dense(
        self,
        queries: Float[Tensor, "batch queries dim_2"],
        keys: Float[Tensor, "batch keys dim"],
        adjacency: Bool[Tensor, "#batch queries keys"],
        at_once: int = AT_ONCE,
        edge_attr: Float[Tensor, "#batch queries keys channels"] | None = None,
    ) -> DenseAttended:
        """The same between all pairs that are marked, for batches of graphs or sets; no loop is added.

        Args:
            queries: the targets.
            keys: the sources.
            adjacency: True = this query takes of this key.
            at_once: so many numbers are held at once at most, before they become scores, or those of one query and key in each
                item; backward computes them anew.
            edge_attr: what is known of each pair, by a layer with `edge_dim`.

        Raises:
            InputError: where `edge_attr` lacks, is given for nothing, or does not fit the pairs.
        """
        self._check_pairs(edge_attr, queries.shape[1], keys.shape[1])
        # keys that none takes of, and queries that take of none, may hold anything
        q, k, v = self.projected(cleared(keys, adjacency.any(1)), cleared(queries, adjacency.any(2)))
        pair = max(k.shape[0] * k.shape[2] * k.shape[3], 1)
        columns = max(min(at_once // pair, k.shape[1]), 1)
        rows = max(at_once // (pair * columns), 1)

        def part(some: Tensor, of: Tensor, known: Tensor | None) -> Tensor:
            edge = None
            if self.lin_edge is not None and known is not None:
                edge = self.lin_edge(known.to(v.dtype)).unflatten(-1, (self.heads, -1))
            return self.dense_scores(some, of, edge)

        def row(some: Tensor, known: Tensor | None) -> Tensor:
            told = [None] * len(k.split(columns, 1)) if known is None else known.split(columns, 2)
            every = []
            for of, beside in zip(k.split(columns, 1), told, strict=True):
                if torch.is_grad_enabled():
                    every.append(checkpoint(part, some, of, beside, use_reentrant=False))
                else:
                    every.append(part(some, of, beside))
            return torch.cat(every, 3)

        parts = q.split(rows, 1)
        told = [None] * len(parts) if edge_attr is None else edge_attr.split(rows, 1)
        scores = torch.cat([row(some, known) for some, known in zip(parts, told, strict=True)], 2)
        seen = adjacency.unsqueeze(1)
        weights = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        weights = weights.masked_fill(~seen, torch.finfo(weights.dtype).min).softmax(-1)
        weights = weights.masked_fill(~seen, 0.0).to(v.dtype)
        taken = F.dropout(weights, self.dropout, self.training) @ v.transpose(1, 2)
        return DenseAttended(self._out(taken.transpose(1, 2), queries), weights)

    @abstractmethod
    def projected(
        self, sources: Float[Tensor, "*rows dim"], targets: Float[Tensor, "*others dim_2"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of targets what asks, of sources what is asked and what is taken, `[..., heads, width]` each."""

    @abstractmethod
    def scores(
        self,
        q: Float[Tensor, "edges heads width"],
        k: Float[Tensor, "edges heads width"],
        edge: Float[Tensor, "edges heads width"] | None,
    ) -> Float[Tensor, "edges heads"]:
        """One number per edge and head."""

    @abstractmethod
    def dense_scores(
        self,
        q: Float[Tensor, "batch queries heads width"],
        k: Float[Tensor, "batch keys heads width"],
        edge: Float[Tensor, "#batch queries keys heads channels"] | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The same for every pair."""

    def _out(self, taken: Tensor, targets: Tensor) -> Tensor:
        y = taken.flatten(-2) if self.join else taken.mean(-2)
        y = y if self.res is None else y + self.res(targets)
        return y if self.bias is None else y + self.bias

    def _checked(
        self, x: Nodes, edge_index: Tensor, edge_attr: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        sources, targets = (x, x) if isinstance(x, Tensor) else x
        for name, given, wanted in (("sources", sources, self.dims[0]), ("targets", targets, self.dims[1])):
            if given.dim() != 2 or given.shape[1] != wanted:
                raise InputError(f"x: expected {name} [nodes, {wanted}], got {list(given.shape)}")
            require_floating(given)
            require_dtype_of(self, given)
        if (self.lin_edge is None) != (edge_attr is None):
            said = "none, for a layer built without edge_dim" if self.lin_edge is None else "features of every edge"
            raise InputError(
                f"edge_attr: expected {said}, got {'none' if edge_attr is None else list(edge_attr.shape)}"
            )
        if edge_attr is not None and edge_attr.dim() == 1:
            edge_attr = edge_attr.unsqueeze(1)
        if sources is targets:
            check_edges(edge_index, edge_attr, torch.zeros(len(sources), dtype=torch.long, device=sources.device))
            if self.loops:
                edge_index, edge_attr = with_loops(edge_index, len(sources), edge_attr)
        else:
            _check_between(edge_index, len(sources), len(targets))
        return sources, targets, edge_index, edge_attr

    def _check_pairs(self, edge_attr: Tensor | None, queries: int, keys: int) -> None:
        came = "none" if edge_attr is None else list(edge_attr.shape)
        if self.lin_edge is None:
            if edge_attr is not None:
                raise InputError(f"edge_attr: expected none, for a layer built without edge_dim, got {came}")
            return
        wanted = [queries, keys, self.lin_edge.in_features]
        if edge_attr is None or edge_attr.dim() != 4 or list(edge_attr.shape[1:]) != wanted:
            raise InputError(f"edge_attr: expected features of every pair [batch, {str(wanted)[1:]}, got {came}")

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))


class GATv2Conv(GraphAttention):
    """`e_ij = a . leakyrelu(W_r x_i + W_l x_j + W_e f_ij)`, `y_i = sum_j softmax_j(e_ij) W_l x_j`, by head.

    The nonlinearity stands before the product with `a`, so that each node can rank its neighbours in an order of its own.

    Args:
        dim: width of a node; of sources and of targets, where they are not the same nodes.
        out_dim: width of a head.
        heads: number of heads.
        slope: of the leaky ReLU below 0; 1 makes the attention static.
        share_weights: whether `W_r` is `W_l`.
        join, dropout, loops, edge_dim, bias, residual: as of `GraphAttention`.

    Example:
        >>> layer = GATv2Conv(4, 8, heads=2)
        >>> found = layer.attend(torch.randn(3, 4), torch.tensor([[0, 1], [2, 2]]))
        >>> found.output.shape, found.edge_index.tolist()
        (torch.Size([3, 16]), [[0, 1, 0, 1, 2], [2, 2, 0, 1, 2]])

    Source:
        Brody et al. 2022, arXiv 2105.14491, equation 7. Parameters carry the names of PyTorch Geometric's layer, which the
        authors contributed.
    """

    def __init__(
        self,
        dim: int | tuple[int, int],
        out_dim: int,
        heads: int = 1,
        *,
        slope: float = 0.2,
        share_weights: bool = False,
        join: bool = True,
        dropout: float = 0.0,
        loops: bool = True,
        edge_dim: int | None = None,
        bias: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__(
            dim,
            out_dim,
            heads,
            join=join,
            dropout=dropout,
            loops=loops,
            edge_dim=edge_dim,
            bias=bias,
            residual=residual,
        )
        if share_weights and self.dims[0] != self.dims[1]:
            raise InputError(
                f"share_weights: sources and targets are of different widths, {self.dims[0]} and {self.dims[1]}"
            )
        self.slope = slope
        self.lin_l = nn.Linear(self.dims[0], heads * out_dim, bias=bias)
        self.lin_r = self.lin_l if share_weights else nn.Linear(self.dims[1], heads * out_dim, bias=bias)
        self.att = nn.Parameter(torch.empty(1, heads, out_dim))
        start_glorot(self)

    def projected(
        self, sources: Float[Tensor, "*rows dim"], targets: Float[Tensor, "*others dim_2"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        k = self._by_head(self.lin_l(sources))
        same = sources is targets and self.lin_l is self.lin_r
        return k if same else self._by_head(self.lin_r(targets)), k, k

    def scores(
        self,
        q: Float[Tensor, "edges heads width"],
        k: Float[Tensor, "edges heads width"],
        edge: Float[Tensor, "edges heads width"] | None,
    ) -> Float[Tensor, "edges heads"]:
        pair = q + k if edge is None else q + k + edge
        return (F.leaky_relu(pair, self.slope) * self.att).sum(-1)

    def dense_scores(
        self,
        q: Float[Tensor, "batch queries heads width"],
        k: Float[Tensor, "batch keys heads width"],
        edge: Float[Tensor, "#batch queries keys heads channels"] | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        pair = q.transpose(1, 2).unsqueeze(3) + k.transpose(1, 2).unsqueeze(2)
        pair = pair if edge is None else pair + edge.permute(0, 3, 1, 2, 4)
        return torch.einsum("bhqkc,hc->bhqk", F.leaky_relu(pair, self.slope), self.att[0])


class GATConv(GraphAttention):
    """`e_ij = leakyrelu(b . W x_i + c . W x_j + d . W_e f_ij)`: the nonlinearity stands behind the products with `a = [b; c]`.

    It keeps the order of what it is given, so that all nodes rank their neighbours in the same order.

    Args:
        dim: width of a node; of sources and of targets, where they are not the same nodes.
        out_dim: width of a head.
        heads: number of heads.
        slope: of the leaky ReLU below 0.
        join, dropout, loops, edge_dim, bias, residual: as of `GraphAttention`.

    Source:
        Velickovic et al. 2018, arXiv 1710.10903.
    """

    def __init__(
        self,
        dim: int | tuple[int, int],
        out_dim: int,
        heads: int = 1,
        *,
        slope: float = 0.2,
        join: bool = True,
        dropout: float = 0.0,
        loops: bool = True,
        edge_dim: int | None = None,
        bias: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__(
            dim,
            out_dim,
            heads,
            join=join,
            dropout=dropout,
            loops=loops,
            edge_dim=edge_dim,
            bias=bias,
            residual=residual,
        )
        self.slope = slope
        self.lin_src = nn.Linear(self.dims[0], heads * out_dim, bias=False)
        self.lin_dst = self.lin_src if isinstance(dim, int) else nn.Linear(self.dims[1], heads * out_dim, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, heads, out_dim))
        self.att_dst = nn.Parameter(torch.empty(1, heads, out_dim))
        self.att_edge = None if edge_dim is None else nn.Parameter(torch.empty(1, heads, out_dim))
        start_glorot(self)

    def projected(
        self, sources: Float[Tensor, "*rows dim"], targets: Float[Tensor, "*others dim_2"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        v = self._by_head(self.lin_src(sources))
        q = v if sources is targets and self.lin_src is self.lin_dst else self._by_head(self.lin_dst(targets))
        # two numbers of a pair are all that a score needs
        return (q * self.att_dst).sum(-1, keepdim=True), (v * self.att_src).sum(-1, keepdim=True), v

    def scores(
        self,
        q: Float[Tensor, "edges heads width"],
        k: Float[Tensor, "edges heads width"],
        edge: Float[Tensor, "edges heads channels"] | None,
    ) -> Float[Tensor, "edges heads"]:
        pair = (q + k).squeeze(-1)
        if edge is not None and self.att_edge is not None:
            pair = pair + (edge * self.att_edge).sum(-1)
        return F.leaky_relu(pair, self.slope)

    def dense_scores(
        self,
        q: Float[Tensor, "batch queries heads width"],
        k: Float[Tensor, "batch keys heads width"],
        edge: Float[Tensor, "#batch queries keys heads channels"] | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        pair = q.squeeze(-1).mT.unsqueeze(3) + k.squeeze(-1).mT.unsqueeze(2)
        if edge is not None and self.att_edge is not None:
            pair = pair + (edge * self.att_edge).sum(-1).permute(0, 3, 1, 2)
        return F.leaky_relu(pair, self.slope)


class DotProductConv(GraphAttention):
    """`e_ij = (Q x_i) . (K x_j + W_e f_ij) / sqrt(width)`, `y_i = sum_j softmax_j(e_ij) V x_j`, by head.

    Args:
        dim: width of a node; of sources and of targets, where they are not the same nodes.
        out_dim: width of a head.
        heads: number of heads.
        join, dropout, loops, edge_dim, bias, residual: as of `GraphAttention`.

    Source:
        The dot-product attention of Brody et al. 2022, arXiv 2105.14491, appendix; Vaswani et al. 2017.
    """

    def __init__(
        self,
        dim: int | tuple[int, int],
        out_dim: int,
        heads: int = 1,
        *,
        join: bool = True,
        dropout: float = 0.0,
        loops: bool = True,
        edge_dim: int | None = None,
        bias: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__(
            dim,
            out_dim,
            heads,
            join=join,
            dropout=dropout,
            loops=loops,
            edge_dim=edge_dim,
            bias=bias,
            residual=residual,
        )
        self.lin_q = nn.Linear(self.dims[1], heads * out_dim, bias=bias)
        self.lin_k = nn.Linear(self.dims[0], heads * out_dim, bias=bias)
        self.lin_v = nn.Linear(self.dims[0], heads * out_dim, bias=bias)
        start_glorot(self)

    def projected(
        self, sources: Float[Tensor, "*rows dim"], targets: Float[Tensor, "*others dim_2"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.lin_q(targets), self.lin_k(sources), self.lin_v(sources)
        return self._by_head(q) * self.head_dim**-0.5, self._by_head(k), self._by_head(v)

    def scores(
        self,
        q: Float[Tensor, "edges heads width"],
        k: Float[Tensor, "edges heads width"],
        edge: Float[Tensor, "edges heads width"] | None,
    ) -> Float[Tensor, "edges heads"]:
        return (q * (k if edge is None else k + edge)).sum(-1)

    def dense_scores(
        self,
        q: Float[Tensor, "batch queries heads width"],
        k: Float[Tensor, "batch keys heads width"],
        edge: Float[Tensor, "#batch queries keys heads channels"] | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        scores = q.transpose(1, 2) @ k.transpose(1, 2).mT
        return scores if edge is None else scores + (q.unsqueeze(2) * edge).sum(-1).permute(0, 3, 1, 2)


def start_glorot(layer: nn.Module) -> None:
    """Matrices and vectors of attention from Glorot's uniform distribution, biases 0."""
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            reach = (6 / (p.shape[-2] + p.shape[-1])) ** 0.5
            nn.init.uniform_(p, -reach, reach)


def _check_between(edge_index: Tensor, sources: int, targets: int) -> None:
    if edge_index.dtype != torch.int64 or edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise InputError(
            f"edge_index: expected an int64 tensor [2, edges], got {edge_index.dtype} {list(edge_index.shape)}"
        )
    for name, row, count in (("source", edge_index[0], sources), ("target", edge_index[1], targets)):
        if row.numel() and not (int(row.min()) >= 0 and int(row.max()) < count):
            raise InputError(
                f"edge_index: expected {name}s from 0 to {count - 1}, got {int(row.min())} to {int(row.max())}"
            )
