"""Top-k hierarchies: PyTorch Geometric's TopKPooling is the oracle of the pooling step."""

import pytest
import torch
from tests.graphs import both_ways, joined, path, random_graph
from tests.pools import shaken
from torch import Tensor

from cenote.core import InputError
from cenote.pool import SparseHierarchicalClassifier, SparseHierarchicalPool
from cenote.pool.graph.base import Graph, as_graph
from cenote.pool.graph.sparse_hierarchical_graph import MeanConv, TopK, readout

geometric = pytest.importorskip("torch_geometric.nn")


def features(nodes: int, seed: int = 0, dim: int = 4) -> Tensor:
    return torch.randn(nodes, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three_graphs() -> Graph:
    x, edges, batch = joined(
        [(features(9), random_graph(9, 20)), (features(1, 1), path(1)), (features(14, 2), path(14))]
    )
    return as_graph(x, edges, torch.arange(edges.shape[1]).double(), batch)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8, 0.99])
def test_a_level_is_that_of_topkpooling(ratio: float) -> None:
    ours = shaken(TopK(4, ratio))
    theirs = geometric.TopKPooling(4, ratio).double()
    theirs.load_state_dict(ours.pooling.state_dict())
    graph = three_graphs()
    x, level = ours(graph)
    expected, edge_index, edge_attr, batch, kept, score = theirs(
        graph.x, graph.edge_index, graph.edge_attr, graph.batch
    )
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(level.scores, score)
    assert torch.equal(level.edge_index, edge_index)
    assert torch.equal(level.batch, batch)
    assert torch.equal(level.edge_attr, edge_attr)
    assert torch.equal(level.assignment[kept], torch.arange(len(kept)))
    assert int((level.assignment < 0).sum()) == len(graph.x) - len(kept)


def test_a_number_of_nodes_is_that_of_topkpooling() -> None:
    ours, graph = shaken(TopK(4, k=3)), three_graphs()
    theirs = geometric.TopKPooling(4, ratio=3).double()
    theirs.load_state_dict(ours.pooling.state_dict())
    x, level = ours(graph)
    torch.testing.assert_close(x, theirs(graph.x, graph.edge_index, batch=graph.batch)[0])
    assert level.batch.bincount().tolist() == [3, 1, 3]


def test_a_least_score_is_that_of_topkpooling() -> None:
    ours, graph = shaken(TopK(4, min_score=0.1)), three_graphs()
    theirs = geometric.TopKPooling(4, min_score=0.1).double()
    theirs.load_state_dict(ours.pooling.state_dict())
    x, level = ours(graph)
    expected, edge_index, *_ = theirs(graph.x, graph.edge_index, batch=graph.batch)
    torch.testing.assert_close(x, expected)
    assert torch.equal(level.edge_index, edge_index)


def test_a_ratio_of_one_keeps_all_and_is_no_number() -> None:
    graph = three_graphs()
    _, level = shaken(TopK(4, ratio=1.0))(graph)
    assert len(level.batch) == len(graph.x)
    assert shaken(TopK(4, k=1))(graph)[1].batch.tolist() == [0, 1, 2]


def test_only_the_direction_of_the_projection_counts() -> None:
    top, graph = shaken(TopK(4, 0.5)), three_graphs()
    x, level = top(graph)
    with torch.no_grad():
        top.pooling.select.weight.mul_(7.0)
    again, same = top(graph)
    torch.testing.assert_close(again, x)
    assert torch.equal(same.assignment, level.assignment)
    with torch.no_grad():
        top.pooling.select.weight.neg_()
    _, reverse = top(graph)
    # of the 14 nodes of the last graph the other 7 stay
    assert not bool(((level.assignment >= 0) & (reverse.assignment >= 0))[10:].any())


def test_a_projection_of_zero_is_finite_and_its_gate_closes() -> None:
    top, graph = TopK(4, 0.5).double(), three_graphs()
    with torch.no_grad():
        top.pooling.select.weight.zero_()
    x, level = top(graph)
    assert torch.equal(x, torch.zeros_like(x))
    # equal scores: the first nodes of each graph stay
    assert (level.assignment[:9] >= 0).tolist() == [True] * 5 + [False] * 4
    x.sum().backward()
    assert bool(top.pooling.select.weight.grad.isfinite().all())


def test_saturated_scores_are_still_ranked() -> None:
    top = TopK(1, 0.5)
    with torch.no_grad():
        top.pooling.select.weight.fill_(1.0)
    x = torch.tensor([[20.0], [30.0], [25.0], [40.0]])
    assert torch.tanh(x).unique().numel() == 1
    _, level = top(as_graph(x, torch.empty(2, 0, dtype=torch.int64)))
    assert level.assignment.tolist() == [-1, 1, -1, 0]


def test_float32_scores_near_ten_do_not_tie() -> None:
    top = TopK(1, k=2)
    with torch.no_grad():
        top.pooling.select.weight.fill_(1.0)
    x = torch.tensor([[10.0], [10.001], [9.999], [10.002]])
    assert torch.tanh(x).unique().numel() == 1
    assert top(as_graph(x, torch.empty(2, 0, dtype=torch.int64)))[1].assignment.tolist() == [-1, 1, -1, 0]


def test_permuted_nodes_give_the_permuted_result() -> None:
    pool, x, edges = shaken(SparseHierarchicalPool(4, hidden=8)), features(9), random_graph(9, 20)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    y, _, levels = pool.attend(x, edges)
    again, _, turned = pool.attend(x[order], place[edges])
    torch.testing.assert_close(again, y)
    assert torch.equal(turned[0].assignment, levels[0].assignment[order])
    torch.testing.assert_close(turned[-1].scores, levels[-1].scores)


def test_levels_without_edges_and_graphs_without_nodes() -> None:
    pool, none = shaken(SparseHierarchicalPool(4, hidden=8, ratio=0.5)), torch.empty(2, 0, dtype=torch.int64)
    for edges in (none, path(2)):
        x = features(5).requires_grad_()
        y, _, levels = pool.attend(x, edges)
        y.sum().backward()
        assert bool(y.isfinite().all())
        assert bool(x.grad.isfinite().all())
        assert levels[-1].edge_index.shape[1] == 0
    empty = pool(features(5), none, batch=torch.tensor([0, 0, 2, 2, 2]), size=3)
    assert torch.equal(empty[1], torch.zeros_like(empty[1]))
    assert bool(empty[0].any())


def test_a_complete_graph_stays_complete() -> None:
    complete = both_ways([(i, j) for i in range(6) for j in range(i)])
    _, level = shaken(TopK(4, 0.5))(as_graph(features(6), complete))
    assert level.edge_index.shape[1] == 3 * 2


def test_the_convolution_is_its_equation() -> None:
    conv, x, edges = shaken(MeanConv(4, 5)), features(6), random_graph(6, 9)
    a = torch.eye(6, dtype=torch.float64)
    a[edges[0], edges[1]] = 1
    mean = a @ x / a.sum(1, keepdim=True)
    lin, root = conv.conv.lin_l, conv.conv.lin_r
    torch.testing.assert_close(conv(x, edges), torch.relu(mean @ lin.weight.T + lin.bias + x @ root.weight.T))


def test_edges_may_weigh_in_the_mean() -> None:
    conv, x = shaken(MeanConv(4, 5)), features(6)
    edges = torch.tensor([[0, 1, 2, 3, 3], [1, 0, 0, 2, 3]])
    weight = torch.tensor([0.5, 2.0, 0.0, 3.0, 4.0], dtype=torch.float64)
    a = torch.eye(6, dtype=torch.float64)
    # a loop that is given keeps its weight; x_j reaches x_i along (j, i)
    a[edges[1], edges[0]] = weight
    lin, root = conv.conv.lin_l, conv.conv.lin_r
    expected = torch.relu((a @ x / a.sum(1, keepdim=True)) @ lin.weight.T + lin.bias + x @ root.weight.T)
    torch.testing.assert_close(conv(x, edges, weight), expected)
    plain = random_graph(6, 9)
    torch.testing.assert_close(conv(x, plain, torch.ones(plain.shape[1], dtype=torch.float64)), conv(x, plain))


def test_a_weighted_hierarchy_reads_the_weights_at_every_level() -> None:
    plain, graph = shaken(SparseHierarchicalPool(4, hidden=8)), three_graphs()
    weighted = SparseHierarchicalPool(4, hidden=8, weighted=True).double()
    weighted.load_state_dict(plain.state_dict())
    edges, batch = graph.edge_index, graph.batch
    ones = torch.ones(edges.shape[1], 1)
    torch.testing.assert_close(weighted(graph.x, edges, ones, batch), plain(graph.x, edges, batch=batch))
    assert not torch.allclose(weighted(graph.x, edges, graph.edge_attr, batch), plain(graph.x, edges, batch=batch))
    # edges without weight are none
    kept = torch.arange(edges.shape[1]) % 2 == 0
    torch.testing.assert_close(
        weighted(graph.x, edges, kept.double(), batch), plain(graph.x, edges[:, kept], batch=batch)
    )
    for wrong in (None, ones[1:], -ones, ones.expand(-1, 2)):
        with pytest.raises(InputError, match="edge_attr"):
            weighted(graph.x, edges, wrong, batch)


def test_the_readouts_of_all_blocks_are_summed() -> None:
    pool, graph = shaken(SparseHierarchicalPool(4, hidden=8)), three_graphs()
    total = torch.zeros(3, 16, dtype=torch.float64)
    now = graph
    for conv, top in zip(pool.convs, pool.pools, strict=True):
        x, level = top(now._replace(x=conv(now.x, now.edge_index)))
        now = Graph(x, level.edge_index, level.edge_attr, level.batch, 3)
        for g in range(3):
            nodes = x[level.batch == g]
            total[g] += torch.cat([nodes.mean(0), nodes.amax(0)])
    y, _, levels = pool.attend(*graph[:4])
    torch.testing.assert_close(y, total)
    assert [level.batch.bincount().tolist() for level in levels] == [[8, 1, 12], [7, 1, 10], [6, 1, 8]]
    assert all(level.edge_attr is not None for level in levels)
    torch.testing.assert_close(readout(x, now.batch, 4)[3], torch.zeros(16, dtype=torch.float64))


def test_a_classifier_gives_logits() -> None:
    model = SparseHierarchicalClassifier(SparseHierarchicalPool(4, hidden=6, blocks=2), outputs=3).double()
    graph = three_graphs()
    assert model(graph.x, graph.edge_index, batch=graph.batch).shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": 0.0}, "ratio"),
        ({"k": 0}, "k:"),
        ({"gate": "relu"}, "gate"),
        ({"blocks": 0}, "blocks"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        SparseHierarchicalPool(4, **options)  # type: ignore[arg-type]
