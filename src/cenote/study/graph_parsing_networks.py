"""Parsing tells graphs with two communities from graphs with four at least as well (less five points) as the mean over all
nodes and as keeping the best half of the nodes, behind the same convolutions. And what it keeps for the backward pass grows
linearly with the number of nodes, while that of a dense soft assignment grows quadratically.

Refuted if its accuracy is more than five points below one of the others, or if its memory grows with an exponent of 1.3 or
more.

600 graphs of 20 to 60 nodes with one mean degree and features that say nothing but the degree; 400 train. One width, one kind
of convolution, the same passes for every arm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core.graphs import Graphs, undirected
from cenote.pool import GraphParsingNetwork, GraphParsingPool
from cenote.pool.graph.base import as_graph, mean_by
from cenote.pool.graph.layers import GraphBlock
from cenote.pool.graph.sparse_hierarchical_graph import TopK
from cenote.study.harness import Arms, Findings, Size, above, below, draw_arms, seeds_of, study
from cenote.study.harness.graphs import (
    GraphData,
    accuracy,
    dense_memory,
    joined,
    pool_memory,
    slope,
    split,
    trained,
)

WIDTH, LAYERS = 32, 2
COMMUNITIES = (2, 4)
DEGREE = 6.0
INSIDE = 0.9
GRAPHS: dict[Size, int] = {"smoke": 30, "small": 600, "full": 2000}
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 20, "full": 60}
SIZES: dict[Size, tuple[int, ...]] = {
    "smoke": (100, 200),
    "small": (200, 400, 800, 1600),
    "full": (200, 400, 800, 1600, 3200),
}
PARSING, MEAN, TOP_K, DENSE = "parsing", "global mean", "best half", "dense assignment"


@study
def run(seed: int, size: Size) -> Findings:
    """Train the three arms; measure the memory of parsing and of a dense assignment."""
    seeds = seeds_of(seed, size)
    arms, memory, shape = Arms(), Arms(), Arms()
    drawn = [split(communities(s, GRAPHS[size]), GRAPHS[size] * 2 // 3) for s in seeds]
    models: dict[str, list[nn.Module]] = {}
    for name, build in {PARSING: _parsing, MEAN: _mean, TOP_K: _top_k}.items():
        models[name] = [trained(build, train, s, EPOCHS[size]) for s, (train, _) in zip(seeds, drawn, strict=True)]
        arms[name] = tuple(accuracy(m, test) for m, (_, test) in zip(models[name], drawn, strict=True))
    costs = {
        PARSING: partial(pool_memory, lambda: GraphParsingPool(2, WIDTH, LAYERS, dropout=0.0)),
        DENSE: partial(dense_memory, WIDTH),
    }
    for name, cost in costs.items():
        memory[name] = tuple(slope(SIZES[size], [cost(s, n) for n in SIZES[size]]) for s in seeds)
    depths = [_depths(m, test) for m, (_, test) in zip(models[PARSING], drawn, strict=True)]
    shape["levels per graph, mean"] = tuple(float(d.double().mean()) for d in depths)
    shape["levels per graph, most minus fewest"] = tuple(float(d.max() - d.min()) for d in depths)
    return Findings(
        seeds=seeds,
        checks=(
            above("accuracy, parsing minus global mean", arms.minus(PARSING, MEAN), expected=-0.05),
            above("accuracy, parsing minus best half", arms.minus(PARSING, TOP_K), expected=-0.05),
            below("exponent of the memory of parsing", memory[PARSING], expected=1.3),
            above("exponent of the memory of a dense assignment", memory[DENSE], expected=1.6, in_rule=False),
            above("accuracy of parsing above that of the global mean", arms.minus(PARSING, MEAN), 0.0, in_rule=False),
        ),
        table=[
            *arms.table(f"accuracy, {GRAPHS[size] - GRAPHS[size] * 2 // 3} test graphs"),
            *memory.table("exponent of the numbers kept for the backward pass"),
            *shape.table("hierarchy"),
        ],
        figure=partial(_draw, arms=arms, memory=memory),
        notes=(
            f"Mean degree {DEGREE:g}, {INSIDE:.0%} of the edges inside a community; features: 1 and the degree. Width {WIDTH}, "
            f"{LAYERS} graph convolutions per level, Adam, {EPOCHS[size]} passes.",
            f"Memory: one Erdos-Renyi graph of {', '.join(map(str, SIZES[size]))} nodes with twice as many edges; the dense "
            "assignment goes to a quarter of the nodes.",
        ),
    )


def communities(seed: int, count: int) -> GraphData:
    """Graphs of two (class 0) or four (class 1) communities.

    >>> communities(0, 4).y.tolist()
    [0, 1, 0, 1]
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    return GraphData(joined([_planted(COMMUNITIES[c], generator) for c in y.tolist()]), y)


def _planted(groups: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    nodes = int(torch.randint(20, 61, (), generator=generator))
    group = torch.arange(nodes) % groups
    pairs = torch.combinations(torch.arange(nodes)).T
    same = group[pairs[0]] == group[pairs[1]]
    edges = nodes * DEGREE / 2
    # the same expected number of edges for either class
    p = torch.where(same, edges * INSIDE / same.sum(), edges * (1 - INSIDE) / (~same).sum())
    chosen = pairs[:, torch.rand(len(p), generator=generator) < p]
    edge_index = undirected(torch.randperm(nodes, generator=generator)[chosen], nodes)
    degree = edge_index[0].bincount(minlength=nodes)
    return torch.stack([torch.ones(nodes), degree / DEGREE], 1), edge_index


class _Flat(nn.Module):
    """The same convolutions, and one pooling: the mean over all nodes, or over the best half and their gates."""

    def __init__(self, top: bool) -> None:
        super().__init__()
        self.input = nn.Linear(2, WIDTH)
        self.gnn = GraphBlock(WIDTH, LAYERS, 0.0, True)
        self.top = TopK(WIDTH, 0.5) if top else None
        self.after = GraphBlock(WIDTH, LAYERS, 0.0, True)
        self.out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

    def forward(self, graphs: Graphs) -> Tensor:
        graph = as_graph(graphs, None)
        x = self.gnn(self.input(graph.x), graph.edge_index)
        edge_index, batch = graph.edge_index, graph.batch
        if self.top is not None:
            x, level = self.top(graph._replace(x=x))
            edge_index, batch = level.edge_index, level.batch
        return self.out(mean_by(self.after(x, edge_index), batch, graph.size))


def _parsing() -> nn.Module:
    return GraphParsingNetwork(GraphParsingPool(2, WIDTH, LAYERS, dropout=0.0), 2, dropout=0.0)


def _mean() -> nn.Module:
    return _Flat(top=False)


def _top_k() -> nn.Module:
    return _Flat(top=True)


@torch.no_grad()
def _depths(model: nn.Module, data: GraphData) -> Tensor:
    assert isinstance(model, GraphParsingNetwork)
    graphs = (data.x.select(torch.tensor([i])) for i in range(len(data.y)))
    return torch.tensor([len(model.pool.attend(g).levels) for g in graphs])


def _draw(figure: Any, arms: Arms, memory: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, arms, "accuracy, two or four communities")
    draw_arms(right, memory, "exponent of memory over nodes")
