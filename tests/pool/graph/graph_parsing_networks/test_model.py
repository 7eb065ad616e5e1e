"""Graph parsing: the parser against networkx, the hierarchy against closed forms."""

import math

import pytest
import torch
from tests.graphs import both_ways, joined, path, random_graph, star
from tests.pools import shaken
from torch import Tensor

from cenote.core import InputError
from cenote.core.graphs import undirected
from cenote.pool import EdgeScores, GraphParsingNetwork, GraphParsingNodes, GraphParsingPool
from cenote.pool.graph.base import as_graph
from cenote.pool.graph.graph_parsing_networks.parsing import parse

pytest.importorskip("torch_geometric")


def zeros(nodes: int) -> Tensor:
    return torch.zeros(nodes, dtype=torch.int64)


def symmetric_scores(edges: Tensor, nodes: int, seed: int = 0) -> Tensor:
    drawn = torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn + drawn.T)[edges[0], edges[1]]


def features(nodes: int, seed: int = 0, dim: int = 4) -> Tensor:
    return torch.randn(nodes, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pool(**options: object) -> GraphParsingPool:
    return shaken(GraphParsingPool(4, hidden=6, gnn_layers=1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_parse_is_a_step_of_boruvka(seed: int) -> None:
    networkx = pytest.importorskip("networkx")
    nodes, edges = 30, random_graph(30, 45, seed)
    scores = symmetric_scores(edges, nodes, seed)
    level = parse(scores, edges, zeros(nodes))
    graph = networkx.Graph()
    graph.add_nodes_from(range(nodes))
    graph.add_weighted_edges_from((u, v, s) for (u, v), s in zip(edges.T.tolist(), scores.tolist(), strict=True))
    dominant = [(u, max(graph[u], key=lambda v, u=u: graph[u][v]["weight"])) for u in range(nodes) if len(graph[u])]
    tree = networkx.maximum_spanning_tree(graph)
    assert all(tree.has_edge(u, v) for u, v in dominant)
    chosen = networkx.Graph(dominant)
    chosen.add_nodes_from(range(nodes))
    expected = {frozenset(c) for c in networkx.connected_components(chosen)}
    assert {
        frozenset((level.assignment == c).nonzero().flatten().tolist()) for c in range(len(level.batch))
    } == expected


def test_scores_counts_and_new_edges_are_those_written_out() -> None:
    nodes, edges = 25, random_graph(25, 50, 3)
    scores = symmetric_scores(edges, nodes, 3)
    level = parse(scores, edges, zeros(nodes))
    pairs = list(zip(edges.T.tolist(), scores.tolist(), strict=True))
    assert level.counts is not None
    for c in range(len(level.batch)):
        inside = [s for (u, v), s in pairs if level.assignment[u] == c and level.assignment[v] == c]
        assert level.counts[c] == max(len(inside), 1)
        assert level.scores[c] == pytest.approx(sum(inside) / len(inside) if inside else 1.0)
    between = {(int(level.assignment[u]), int(level.assignment[v])) for (u, v), _ in pairs}
    assert {tuple(e) for e in level.edge_index.T.tolist()} == {(a, b) for a, b in between if a != b}


def test_a_star_and_a_rising_path_are_one_community() -> None:
    edges = star(7)
    assert len(parse(symmetric_scores(edges, 8), edges, zeros(8)).batch) == 1
    edges = path(9)
    rising = edges.max(0).values.double()
    level = parse(rising, edges, zeros(9))
    assert level.assignment.tolist() == [0] * 9
    assert level.counts.tolist() == [16]  # type: ignore[union-attr]


def test_equal_scores_merge_by_the_order_of_edges() -> None:
    complete = both_ways([(i, j) for i in range(5) for j in range(i)])
    level = parse(torch.full((20,), 0.5), complete, zeros(5))
    assert level.assignment.tolist() == [0] * 5
    # every node points back: 0-1 and, since 2 prefers 1, all of the path
    assert parse(torch.full((10,), 0.5), path(6), zeros(6)).assignment.tolist() == [0] * 6
    assert torch.equal(parse(torch.ones(20), complete, zeros(5)).assignment, level.assignment)


def test_nodes_without_edges_stay_alone() -> None:
    level = parse(torch.tensor([0.3, 0.3]), both_ways([(1, 3)]), torch.tensor([0, 0, 0, 0, 1]))
    assert level.assignment.tolist() == [0, 1, 2, 1, 3]
    assert level.batch.tolist() == [0, 0, 0, 1]
    assert level.scores.tolist() == pytest.approx([1, 0.3, 1, 1])
    assert level.counts.tolist() == [1, 2, 1, 1]  # type: ignore[union-attr]


def test_each_level_at_least_halves_what_has_neighbours() -> None:
    x, edges, batch = joined([(features(40, 1), random_graph(40, 60, 1)), (features(30, 2), path(30))])
    levels = pool().attend(x, edges, batch=batch).levels
    nodes, now = len(x), undirected(edges, len(x))
    for level in levels:
        joined_before = len(now[0].unique())
        alone = nodes - joined_before
        assert len(level.batch) <= alone + joined_before // 2
        nodes, now = len(level.batch), level.edge_index
    assert not now.numel()
    assert len(levels) <= math.log2(70)


def test_renaming_the_nodes_renames_the_communities() -> None:
    nodes, edges = 30, random_graph(30, 45, 4)
    scores = symmetric_scores(edges, nodes, 4)
    level = parse(scores, edges, zeros(nodes))
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(0))
    renamed = order.argsort()[edges]
    sort = (renamed[0] * nodes + renamed[1]).argsort()
    moved = parse(scores[sort], renamed[:, sort], zeros(nodes))
    same = level.assignment[order].unsqueeze(0) == level.assignment[order].unsqueeze(1)
    assert torch.equal(moved.assignment.unsqueeze(0) == moved.assignment.unsqueeze(1), same)
    torch.testing.assert_close(moved.scores[moved.assignment], level.scores[level.assignment][order])
    assert len(level.assignment) == nodes
    assert sorted(level.assignment.unique().tolist()) == list(range(len(level.batch)))


def test_one_node_is_its_transformation_and_a_graph_without_nodes_gives_zeros() -> None:
    p, x = pool(), features(1)
    none = torch.empty(2, 0, dtype=torch.int64)
    torch.testing.assert_close(p(x, none), p.input(x))  # type: ignore[misc]
    y = p(torch.cat([x, x]), none, batch=torch.tensor([0, 2]))
    assert y.shape == (3, 6)
    assert y[1].eq(0).all()
    torch.testing.assert_close(y[2:], p(x, none))


def test_scores_are_equal_in_both_directions_bit_for_bit() -> None:
    edges = random_graph(50, 200)
    scores, kept = EdgeScores(4)(features(50).float(), edges)
    found = {tuple(e): s for e, s in zip(kept.T.tolist(), scores.tolist(), strict=True)}
    assert torch.equal(kept, edges)
    assert all(found[v, u] == s for (u, v), s in found.items())


def test_self_loops_let_a_node_choose_itself() -> None:
    scorer = shaken(EdgeScores(4, self_loops=True))
    g = features(3)
    g[0] *= 0
    _, edges = scorer(g, path(3))
    assert edges.T.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 1], [2, 2]]
    forced = torch.tensor([0.9, 0.1, 0.1, 0.2, 0.3, 0.3, 0.1])
    level = parse(forced, edges, zeros(3))
    assert level.assignment.tolist() == [0, 1, 1]
    assert level.counts.tolist() == [1, 4]  # type: ignore[union-attr]
    assert level.scores.tolist() == pytest.approx([0.9, (0.2 + 0.3 + 0.3 + 0.1) / 4])


def test_edge_dropout_hides_whole_edges_in_training_only() -> None:
    scorer = EdgeScores(4, edge_dropout=0.5)
    edges = random_graph(40, 120)
    _, kept = scorer(features(40).float(), edges)
    assert 0.25 < kept.shape[1] / edges.shape[1] < 0.75
    assert torch.equal(undirected(kept, 40), kept)
    _, kept = scorer.eval()(features(40).float(), edges)
    assert torch.equal(kept, edges)


def test_a_graph_without_edges_is_the_sum_of_its_transformed_nodes() -> None:
    p = pool()
    x = features(5)
    y, _, levels = p.attend(x, torch.empty(2, 0, dtype=torch.int64))
    assert levels == ()
    torch.testing.assert_close(y, p.input(x).sum(0, keepdim=True))  # type: ignore[misc]


def test_one_level_is_the_equation() -> None:
    p = pool(second_gnn=1)
    x, edges = features(2), path(2)
    h = p.input(x)  # type: ignore[misc]
    g = p.gnn(h, edges)
    s = torch.sigmoid(p.parser.mlp(g[0] * g[1])).squeeze()
    assert p.gnn2 is not None
    expected = p.post(p.pre(p.gnn2(h, edges)).sum(0)) * 2 * s
    torch.testing.assert_close(p(x, edges).squeeze(0), expected)


def test_a_disconnected_graph_does_not_depend_on_deep_batch_mates() -> None:
    p = pool()
    apart = (features(9, 5), both_ways([(0, 1), (2, 3), (3, 4), (5, 6), (6, 7)]))
    deep = (features(64, 6), path(64))
    alone = p.attend(*apart)
    with_mate = p.attend(*joined([apart, deep])[:2], batch=joined([apart, deep])[2])
    assert len(with_mate.levels) > len(alone.levels)
    torch.testing.assert_close(with_mate.output[:1], alone.output)


def test_loops_repeats_and_one_direction_mean_the_same_graph() -> None:
    p = pool()
    x, edges = features(6), random_graph(6, 9)
    up = edges[:, edges[0] < edges[1]]
    loops = torch.arange(6).expand(2, -1)
    expected = p(x, edges)
    for same in (up, torch.cat([edges, up, loops], 1)):
        torch.testing.assert_close(p(x, same), expected)


def test_the_readout_of_levels_sums_means_and_stops_with_the_graph() -> None:
    p = pool(readout="levels")
    small, deep = (features(2, 1), path(2)), (features(40, 2), path(40))
    x, edges = small
    h, steps, levels = p.hierarchy(as_graph(x, edges))
    torch.testing.assert_close(levels, p.input(x).mean(0, keepdim=True) + h)  # type: ignore[misc]
    assert len(steps) == 1
    xs, es, batch = joined([small, deep])
    torch.testing.assert_close(p(xs, es, batch=batch)[:1], levels)


def test_an_encoder_sees_the_edges_as_given() -> None:
    class Bonds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(3, 6).double()

        def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
            return self.lin(x).index_add(0, edge_index[1], edge_attr)

    p = shaken(GraphParsingPool(3, hidden=6, gnn_layers=1, encoder=Bonds(), readout="levels"))
    x, edges = features(5, dim=3), path(5)
    bonds = torch.randn(8, 6, dtype=torch.float64)
    assert not torch.allclose(p(x, edges, bonds), p(x, edges, 2 * bonds))


def test_gradient_reaches_the_parser_through_the_community_scores() -> None:
    p = pool()
    p(features(10), path(10)).sum().backward()
    grad = p.parser.mlp[-1].weight.grad
    assert grad is not None
    assert float(grad.abs().max()) > 0


def test_unpooling_is_the_equation() -> None:
    model = shaken(GraphParsingNodes(GraphParsingPool(4, hidden=6, gnn_layers=1), outputs=3, third_gnn=1))
    x, edges = features(2), path(2)
    h = model.pool.input(x)  # type: ignore[misc]
    top, _, _ = model.pool.hierarchy(as_graph(x, edges))
    assert model.gnn3 is not None
    expected = model.predictor(model.gnn3(top.expand(2, -1) / 2 + h, edges))
    torch.testing.assert_close(model(x, edges), expected)


def test_node_logits_follow_the_nodes_and_not_the_batch() -> None:
    model = shaken(GraphParsingNodes(GraphParsingPool(4, hidden=6, gnn_layers=1), outputs=3))
    apart = (features(9, 5), both_ways([(0, 1), (2, 3), (3, 4), (5, 6), (6, 7)]))
    x, edges, batch = joined([apart, (features(33, 6), path(33))])
    whole = model(x, edges, batch=batch)
    torch.testing.assert_close(whole[:9], model(*apart))
    order = torch.randperm(33)
    renamed = model(x[9:][order], order.argsort()[path(33)])
    torch.testing.assert_close(renamed, whole[9:][order])


def test_a_classifier_trains() -> None:
    torch.manual_seed(0)
    model = GraphParsingNetwork(GraphParsingPool(4, hidden=8, gnn_layers=1, dropout=0.0), outputs=2, dropout=0.0)
    graphs = [(torch.ones(6, 4), path(6)) for _ in range(8)] + [(torch.ones(6, 4), star(5)) for _ in range(8)]
    x, edges, batch = joined(graphs)
    y = torch.tensor([0] * 8 + [1] * 8)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(x, edges, batch=batch), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"readout": "first"}, "readout"),
        ({"edge_dropout": 1.0}, "edge_dropout"),
        ({"conv": "gcnn"}, "conv"),
        ({"parse_layers": 0}, "layers"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        GraphParsingPool(4, **options)  # type: ignore[arg-type]
