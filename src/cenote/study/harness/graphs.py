"""Graphs for studies, and one loop that trains a graph classifier on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.graphs import Graphs, undirected
from cenote.study.harness.training import descend, shuffled

BATCH = 50
LEARNING_RATE = 5e-3


class GraphData(NamedTuple):
    """Graphs and their classes."""

    x: Graphs
    y: Int[Tensor, "graphs"]


def joined(graphs: Sequence[tuple[Float[Tensor, "_ dim"], Int[Tensor, "2 _"]]]) -> Graphs:
    """Graphs from their features and edges.

    >>> joined([(torch.ones(2, 3), torch.tensor([[0], [1]]))] * 2).edge_index.tolist()
    [[0, 2], [1, 3]]
    """
    sizes = torch.tensor([0, *(len(x) for x, _ in graphs)]).cumsum(0)
    edges = torch.cat([e + start for (_, e), start in zip(graphs, sizes.tolist(), strict=False)], 1)
    return Graphs(torch.cat([x for x, _ in graphs]), sizes, edges)


def erdos_renyi(nodes: int, edges: int, generator: torch.Generator) -> Int[Tensor, "2 both_ways"]:
    """About so many undirected edges between nodes drawn at random.

    >>> erdos_renyi(10, 20, torch.Generator().manual_seed(0)).shape[0]
    2
    """
    return undirected(torch.randint(nodes, (2, edges), generator=generator), nodes)


def split(data: GraphData, train: int) -> tuple[GraphData, GraphData]:
    """The first graphs for training, the others for the test."""
    items = torch.arange(len(data.y))
    parts = items[:train], items[train:]
    first, second = (GraphData(data.x.select(part), data.y[part]) for part in parts)
    return first, second


def trained(build: Callable[[], nn.Module], data: GraphData, seed: int, epochs: int) -> nn.Module:
    """A classifier `Graphs -> logits` after so many passes; Adam at a rate that falls to zero along a cosine."""
    torch.manual_seed(seed)
    model = build()
    batches = shuffled(len(data.y), BATCH, epochs)
    losses = (F.cross_entropy(model(data.x.select(chosen)), data.y[chosen]) for chosen in batches)
    descend(model.parameters(), losses, epochs * -(-len(data.y) // BATCH), LEARNING_RATE, clip=1.0, weight_decay=1e-4)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: GraphData) -> float:
    """Share of the graphs whose class has the largest logit."""
    parts = torch.arange(len(data.y)).split(BATCH)
    return float(torch.cat([model(data.x.select(p)).argmax(1) for p in parts]).eq(data.y).double().mean())


def kept_numbers(call: Callable[[], Tensor]) -> int:
    """How many numbers a forward pass keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        held.append(t)  # as long as it is held, no other storage gets its address
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


def pool_memory(build: Callable[[], nn.Module], seed: int, nodes: int) -> int:
    """Numbers that a graph pool of nodes of width 2 keeps, on a random graph with twice as many edges."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pool = build()
    x, edge_index = torch.randn(nodes, 2, generator=generator), erdos_renyi(nodes, 2 * nodes, generator)
    return kept_numbers(lambda: pool(x, edge_index))


def dense_memory(width: int, seed: int, nodes: int) -> int:
    """Numbers that a dense assignment to a quarter of the nodes keeps, likewise."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pool = DensePool(width, nodes // 4)
    x, adjacency = dense(torch.randn(nodes, width, generator=generator), erdos_renyi(nodes, 2 * nodes, generator))
    return kept_numbers(lambda: pool(x, adjacency))


def slope(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Of the line through the logarithms: 1 grows linearly, 2 quadratically.

    >>> round(slope([10, 100, 1000], [3.0, 300.0, 30000.0]), 3)
    2.0
    """
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(costs, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def dense(x: Float[Tensor, "nodes dim"], edge_index: Int[Tensor, "2 edges"]) -> tuple[Tensor, Tensor]:
    """`(x, adjacency)` of one graph with a leading batch of one, for dense pooling."""
    nodes = x.shape[0]
    adjacency = x.new_zeros(nodes, nodes)
    adjacency[edge_index[0], edge_index[1]] = 1
    return x.unsqueeze(0), adjacency.unsqueeze(0)


class DensePool(nn.Module):
    """DiffPool's step: a soft assignment to `share` of the nodes, `S^T X` and `S^T A S`.

    Args:
        dim: width of a node.
        clusters: how many nodes it assigns to.
    """

    def __init__(self, dim: int, clusters: int) -> None:
        super().__init__()
        self.assign = nn.Linear(dim, clusters)

    def forward(self, x: Float[Tensor, "1 nodes dim"], adjacency: Float[Tensor, "1 nodes nodes"]) -> Tensor:
        s = self.assign(adjacency @ x).softmax(-1)
        pooled, coarse = s.transpose(1, 2) @ x, s.transpose(1, 2) @ adjacency @ s
        return pooled.sum() + coarse.sum()
