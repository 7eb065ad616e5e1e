"""What joins and what stays does not turn with rounding: weights are drawn afresh at every run, graphs are full of ties."""

import pytest
import torch
from tests.graphs import both_ways, joined, path, random_graph
from torch import Tensor, nn

from cenote.pool import GraphLevel, GraphParsingNodes, GraphParsingPool, SparseHierarchicalPool
from cenote.pool.graph.precision import TIE, in_double, ranks

pytest.importorskip("torch_geometric")

PETERSEN = both_ways([e for i in range(5) for e in ((i, (i + 1) % 5), (i, i + 5), (5 + i, 5 + (i + 2) % 5))])
GRID = both_ways(
    [(5 * i + j, 5 * i + j + 1) for i in range(5) for j in range(4)]
    + [(5 * i + j, 5 * i + j + 5) for i in range(4) for j in range(5)]
)
APART = both_ways([(0, 1), (2, 3), (3, 4), (5, 6), (6, 7)])
POOLS = {
    "parsing": lambda: GraphParsingPool(4, hidden=16, gnn_layers=2),
    "top-k": lambda: SparseHierarchicalPool(4, hidden=16),
}


def graphs() -> list[tuple[Tensor, Tensor]]:
    """All nodes alike on symmetric graphs, and nodes drawn at random."""
    drawn = int(torch.randint(10**6, ()))
    alike = [(torch.ones(10, 4), PETERSEN), (torch.ones(25, 4), GRID), (torch.ones(30, 4), random_graph(30, 40, drawn))]
    return [*alike, (torch.randn(64, 4), path(64)), (torch.randn(9, 4), APART), (torch.randn(1, 4), path(1))]


def partition(levels: tuple[GraphLevel, ...], start: int, nodes: int) -> list[Tensor]:
    """Where each of these nodes is at each level, counted from the first of them that is there."""
    found, now = [], torch.arange(start, start + nodes)
    for level in levels:
        now = torch.where(now >= 0, level.assignment[now.clamp(min=0)], -1)
        kept = now[now >= 0]
        found.append(torch.where(now >= 0, now - (int(kept.min()) if len(kept) else 0), -1))
    return found


@pytest.mark.parametrize("name", POOLS)
def test_a_graph_does_not_depend_on_its_batch_mates_to_the_bit(name: str) -> None:
    for _ in range(20):
        pool = POOLS[name]().eval()
        batch = graphs()
        whole = pool.attend(*joined(batch)[:2], batch=joined(batch)[2])
        start = 0
        for i, (x, edges) in enumerate(batch):
            alone = pool.attend(x, edges)
            together = partition(whole.levels, start, len(x))
            for level, (one, other) in enumerate(zip(partition(alone.levels, 0, len(x)), together, strict=False)):
                assert torch.equal(one, other), f"graph {i}, level {level}"
            # computed in float64: the last bit of float32 does not see what rounding does there
            torch.testing.assert_close(alone.output[0], whole.output[i], rtol=1e-6, atol=1e-6)
            start += len(x)


def test_node_logits_do_not_depend_on_batch_mates() -> None:
    for _ in range(5):
        model = GraphParsingNodes(GraphParsingPool(4, hidden=16, gnn_layers=1), outputs=3).eval()
        batch = graphs()
        x, edges, of_graph = joined(batch)
        alone = torch.cat([model(x, e) for x, e in batch])
        torch.testing.assert_close(model(x, edges, batch=of_graph), alone, rtol=1e-5, atol=1e-5)


def test_ranks_tie_what_is_equal_to_rounding_in_each_group() -> None:
    scores = torch.tensor([0.3, 0.3 + TIE / 100, 0.3 + TIE, 0.1, 0.3, 0.9], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    found = ranks(scores, group)
    assert found[0] == found[1]
    assert found[3] < found[0] < found[2]
    assert found[4] < found[5]
    # a tie is measured by the largest score of the group alone
    assert (ranks(scores * 1e6, group).diff() == found.diff()).all()
    assert ranks(scores[:0], group[:0]).numel() == 0
    single = ranks(torch.tensor([0.5, 0.5 + 1e-7]), group[:2])
    assert single[0] < single[1]


def test_double_inside_keeps_the_precision_outside_and_moves_running_statistics() -> None:
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    twin = nn.BatchNorm1d(3)
    y = in_double(norm, norm.__call__, x)
    torch.testing.assert_close(y, twin(x))
    assert y.dtype == torch.float32
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())
    y.sum().backward()
    assert norm.bias.grad is not None
    assert norm.bias.grad.dtype == torch.float32
    pool = GraphParsingPool(4, hidden=8, gnn_layers=1)
    assert pool(torch.randn(3, 4).half(), path(3)).dtype == torch.float16
    assert pool.input is not None
    assert all(p.dtype == torch.float32 for p in pool.parameters())


def test_the_precision_of_x_may_be_kept() -> None:
    seen = []
    pool = GraphParsingPool(4, hidden=8, gnn_layers=1, precise=False)
    pool.post.register_forward_hook(lambda _module, _inputs, y: seen.append(y.dtype))
    pool(torch.randn(3, 4), path(3))
    pool.precise = True
    pool(torch.randn(3, 4), path(3))
    assert seen[0] == torch.float32
    assert seen[-1] == torch.float64
