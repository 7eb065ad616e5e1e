"""A hierarchy that keeps the best nodes tells which motif is planted in a graph at least as well (less five points) as one
mean over all nodes behind the same convolutions, its scores find the motif, and what it keeps for the backward pass grows
linearly with the number of nodes.

Refuted if its memory grows with an exponent of 1.3 or more, if its accuracy is more than five points below the mean's, or if
its scores find the nodes of the motif with an AUROC of 0.7 or less.

600 random graphs of 40 to 80 nodes in which six nodes are joined to a clique or to a ring; a feature of each node says, with
noise, whether it is one of the six. 400 train.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cenote.core.graphs import Graphs, undirected
from cenote.pool import SparseHierarchicalClassifier, SparseHierarchicalPool
from cenote.pool.graph.base import as_graph, mean_by
from cenote.pool.graph.sparse_hierarchical_graph import MeanConv
from cenote.study.harness import Arms, Findings, Size, above, below, draw_arms, seeds_of, study
from cenote.study.harness.graphs import (
    GraphData,
    accuracy,
    dense_memory,
    erdos_renyi,
    joined,
    pool_memory,
    slope,
    split,
    trained,
)

WIDTH, BLOCKS = 32, 3
MOTIF = 6
NOISE = 0.5
GRAPHS: dict[Size, int] = {"smoke": 30, "small": 600, "full": 2000}
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 30, "full": 60}
SIZES: dict[Size, tuple[int, ...]] = {
    "smoke": (250, 500),
    "small": (500, 1000, 2000, 4000, 8000),
    "full": (500, 1000, 2000, 4000, 8000, 16000),
}
DENSE_AT_MOST = 2000
HIERARCHY, MEAN, DENSE = "hierarchy", "global mean", "dense assignment"


@study
def run(seed: int, size: Size) -> Findings:
    """Train both arms; measure memory, and how well the first scores find the motif."""
    seeds = seeds_of(seed, size)
    arms, memory, found = Arms(), Arms(), Arms()
    drawn = [motifs(s, GRAPHS[size]) for s in seeds]
    train = GRAPHS[size] * 2 // 3
    parts = [split(data, train) for data, _ in drawn]
    models: dict[str, list[nn.Module]] = {}
    for name, build in {HIERARCHY: _hierarchy, MEAN: _Mean}.items():
        models[name] = [trained(build, first, s, EPOCHS[size]) for s, (first, _) in zip(seeds, parts, strict=True)]
        arms[name] = tuple(accuracy(m, test) for m, (_, test) in zip(models[name], parts, strict=True))
    sizes = SIZES[size]
    small = [n for n in sizes if n <= DENSE_AT_MOST]
    fresh = partial(SparseHierarchicalPool, 2, WIDTH, BLOCKS)
    memory[HIERARCHY] = tuple(slope(sizes, [pool_memory(fresh, s, n) for n in sizes]) for s in seeds)
    memory[DENSE] = tuple(slope(small, [dense_memory(WIDTH, s, n) for n in small]) for s in seeds)
    found["scores of the first block"] = tuple(
        _found(m, data, members, train) for m, (data, members) in zip(models[HIERARCHY], drawn, strict=True)
    )
    return Findings(
        seeds=seeds,
        checks=(
            below("exponent of the memory of the hierarchy", memory[HIERARCHY], expected=1.3),
            above("accuracy, hierarchy minus global mean", arms.minus(HIERARCHY, MEAN), expected=-0.05),
            above("AUROC of the scores for the motif", found["scores of the first block"], expected=0.7),
            above("exponent of the memory of a dense assignment", memory[DENSE], expected=1.6, in_rule=False),
        ),
        table=[
            *arms.table(f"accuracy, {GRAPHS[size] - train} test graphs"),
            *memory.table("exponent of the numbers kept for the backward pass"),
            *found.table("AUROC for the nodes of the motif, test graphs"),
        ],
        figure=partial(_draw, arms=arms, memory=memory),
        notes=(
            f"Width {WIDTH}, {BLOCKS} blocks, 0.8 of the nodes stay at each; the mean is over all nodes after as many "
            f"convolutions. Adam, {EPOCHS[size]} passes.",
            "The first block sees the noisy feature of a node and the mean of its neighbours'; only nodes with high scores are "
            "kept, so that the AUROC is not turned round where the scores run the other way.",
            "Memory: Erdos-Renyi graphs with twice as many edges as nodes; the dense assignment, to a quarter of the nodes, "
            f"is measured to {DENSE_AT_MOST} nodes.",
        ),
    )


def motifs(seed: int, count: int) -> tuple[GraphData, Tensor]:
    """Graphs with a clique (class 0) or a ring (class 1), and which nodes belong to it.

    >>> data, members = motifs(0, 2)
    >>> int(members.sum()), len(members) == len(data.x.values)
    (12, True)
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    graphs, members = [], []
    for c in y.tolist():
        nodes = int(torch.randint(40, 81, (), generator=generator))
        chosen = torch.randperm(nodes, generator=generator)[:MOTIF]
        ring = torch.stack([torch.arange(MOTIF), (torch.arange(MOTIF) + 1) % MOTIF])
        pairs = ring if c else torch.combinations(torch.arange(MOTIF)).T
        edges = torch.cat([erdos_renyi(nodes, 2 * nodes, generator), chosen[pairs]], 1)
        member = torch.zeros(nodes)
        member[chosen] = 1
        feature = member + NOISE * torch.randn(nodes, generator=generator)
        graphs.append((torch.stack([torch.ones(nodes), feature], 1), undirected(edges, nodes)))
        members.append(member)
    return GraphData(joined(graphs), y), torch.cat(members)


class _Mean(nn.Module):
    """The same convolutions and one mean over all nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([MeanConv(WIDTH if i else 2, WIDTH) for i in range(BLOCKS)])
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

    def forward(self, graphs: Graphs) -> Tensor:
        x, edge_index, _, batch, size = as_graph(graphs, None)
        for conv in self.convs:
            x = conv(x, edge_index)
        return self.mlp(mean_by(x, batch, size))


def _hierarchy() -> nn.Module:
    return SparseHierarchicalClassifier(SparseHierarchicalPool(2, WIDTH, BLOCKS), 2)


@torch.no_grad()
def _found(model: nn.Module, data: GraphData, members: Tensor, train: int) -> float:
    from sklearn.metrics import roc_auc_score

    assert isinstance(model, SparseHierarchicalClassifier)
    pool = model.pool
    h = pool.convs[0](data.x.values, data.x.edge_index)
    top: Any = pool.pools[0]
    y = (h @ nn.functional.normalize(top.pooling.select.weight, dim=-1).T).squeeze(1)
    test = slice(int(data.x.offsets[train]), None)
    return float(roc_auc_score(members[test].numpy(), y[test].numpy()))


def _draw(figure: Any, arms: Arms, memory: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, arms, "accuracy, clique or ring")
    draw_arms(right, memory, "exponent of memory over nodes")
