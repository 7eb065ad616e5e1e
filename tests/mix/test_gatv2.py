"""Graph attention against PyTorch Geometric, and what makes it static."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.core.graphs import Graphs
from cenote.mix.gatv2.conv import DotProductConv, GATConv, GATv2Conv, GraphAttention
from cenote.mix.gatv2.lookup import Lookup, lookup_accuracy, permutations, train_lookup, unseen_combinations
from cenote.mix.gatv2.network import GraphAttentionNetwork
from cenote.mix.gatv2.plain import GCNConv, GINConv
from cenote.mix.gatv2.static import rank_agreement, static_key

EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 1, 1, 0], [1, 2, 0, 1, 3, 1, 0, 0, 4]])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(layer: Any) -> Any:
    """Biases off their zeros too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.double().parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"heads": 8, "concat": False},
        {"heads": 2, "share_weights": True, "bias": False},
        {"heads": 2, "edge_dim": 3, "residual": True},
        {"heads": 3, "add_self_loops": False, "edge_dim": 3, "concat": False, "residual": True},
    ],
)
def test_gatv2_is_pytorch_geometrics_layer(settings: dict[str, Any]) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    theirs = geometric.GATv2Conv(4, 5, **settings).double()
    ours = GATv2Conv(4, 5, **{{"concat": "join", "add_self_loops": "loops"}.get(k, k): v for k, v in settings.items()})
    shaken(ours)
    theirs.load_state_dict(ours.state_dict())
    x, attr = randn(6, 4), randn(9, 3, seed=2) if "edge_dim" in settings else None
    y, (edges, weights) = theirs(x, EDGES, attr, return_attention_weights=True)
    found = ours.attend(x, EDGES, attr)
    torch.testing.assert_close(found.output, y, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.edge_index, edges)
    torch.testing.assert_close(found.weights, weights, atol=1e-12, rtol=1e-12)


def test_between_two_kinds_of_nodes_it_is_pytorch_geometrics_layer() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    ours = shaken(GATv2Conv((4, 3), 5, 2))
    theirs = geometric.GATv2Conv((4, 3), 5, 2, add_self_loops=False).double()
    theirs.load_state_dict(ours.state_dict())
    x, edges = (randn(6, 4), randn(2, 3, seed=1)), torch.tensor([[0, 5, 3, 3], [1, 1, 0, 1]])
    torch.testing.assert_close(ours(x, edges), theirs(x, edges), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"heads": 8, "concat": False}, {"heads": 2, "edge_dim": 3}])
def test_gat_is_pytorch_geometrics_layer(settings: dict[str, Any]) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    theirs = geometric.GATConv(4, 5, **settings).double()
    ours = shaken(GATConv(4, 5, **{{"concat": "join"}.get(k, k): v for k, v in settings.items()}))
    state = ours.state_dict()
    theirs.load_state_dict({k.replace("lin_src", "lin"): v for k, v in state.items() if not k.startswith("lin_dst")})
    x, attr = randn(6, 4), randn(9, 3, seed=2) if "edge_dim" in settings else None
    torch.testing.assert_close(ours(x, EDGES, attr), theirs(x, EDGES, attr), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", [GATv2Conv, GATConv, DotProductConv])
def test_the_dense_form_is_the_form_of_edges(kind: type[GraphAttention]) -> None:
    layer = shaken(kind(4, 5, 2, loops=False))
    x = randn(6, 4)
    edges = EDGES[:, [0, 1, 2, 3, 4, 5, 6, 8]]
    seen = torch.zeros(6, 6, dtype=torch.bool)
    seen[edges[1], edges[0]] = True
    sparse = layer.attend(x, edges)
    for at_once in (1, 1 << 20):
        dense = layer.dense(x[None], x[None], seen[None], at_once)
        torch.testing.assert_close(dense.output[0], sparse.output, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(dense.weights[0, :, edges[1], edges[0]].T, sparse.weights, atol=1e-12, rtol=1e-12)
    x.requires_grad_()
    (by_part,) = torch.autograd.grad(layer.dense(x[None], x[None], seen[None], 1).output.square().sum(), x)
    (whole,) = torch.autograd.grad(layer(x, edges).square().sum(), x)
    torch.testing.assert_close(by_part, whole, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", [GATv2Conv, GATConv, DotProductConv])
def test_the_dense_form_knows_what_is_known_of_pairs(kind: type[GraphAttention]) -> None:
    layer = shaken(kind(4, 5, 2, loops=False, edge_dim=3))
    x, known = randn(6, 4), randn(1, 6, 6, 3, seed=2)
    edges = EDGES[:, [0, 1, 2, 3, 4, 5, 6, 8]]
    seen = torch.zeros(1, 6, 6, dtype=torch.bool)
    seen[0, edges[1], edges[0]] = True
    sparse = layer(x, edges, known[0, edges[1], edges[0]])
    for at_once in (1, 47, 1 << 20):
        dense = layer.dense(x[None], x[None], seen, at_once, edge_attr=known)
        torch.testing.assert_close(dense.output[0], sparse, atol=1e-12, rtol=1e-12)
    known.requires_grad_()
    of_layer = [*layer.parameters()]
    by_part = torch.autograd.grad(
        layer.dense(x[None], x[None], seen, 1, edge_attr=known).output.square().sum(), [known, *of_layer]
    )
    whole = torch.autograd.grad(layer(x, edges, known[0, edges[1], edges[0]]).square().sum(), [known, *of_layer])
    for a, b in zip(by_part, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    for wrong in (None, known[:, :5], known[..., :2], known[0]):
        with pytest.raises(InputError, match=r"edge_attr: expected features of every pair \[batch, 6, 6, 3\]"):
            layer.dense(x[None], x[None], seen, edge_attr=wrong)
    with pytest.raises(InputError, match="edge_attr: expected none"):
        kind(4, 5).double().dense(x[None], x[None], seen, edge_attr=known)


def test_the_dense_form_never_holds_all_pairs_by_channel() -> None:
    held = []

    class Watched(GATv2Conv):
        def dense_scores(self, q: Tensor, k: Tensor, edge: Tensor | None = None) -> Tensor:
            held.append(q.shape[0] * q.shape[1] * k.shape[1] * k.shape[2] * k.shape[3])
            return super().dense_scores(q, k, edge)

    x = randn(1, 12, 4).float()
    Watched(4, 5, 2).dense(x, x, torch.ones(1, 12, 12, dtype=torch.bool), at_once=400)
    assert len(held) == 4
    assert max(held) <= 400
    held.clear()
    # less than one row of queries
    Watched(4, 5, 2).dense(x, x, torch.ones(1, 12, 12, dtype=torch.bool), at_once=100)
    assert max(held) <= 100


@pytest.mark.parametrize("kind", [GATv2Conv, GATConv, DotProductConv])
def test_an_isolated_node_without_a_loop_gives_the_bias(kind: type[GraphAttention]) -> None:
    layer = shaken(kind(4, 5, 2, loops=False))
    x = randn(6, 4).requires_grad_()
    y = layer(x, EDGES)
    torch.testing.assert_close(y[5], layer.bias)
    y.square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    none = torch.empty(2, 0, dtype=torch.long)
    torch.testing.assert_close(layer(x, none), layer.bias.expand(6, -1))
    torch.testing.assert_close(
        layer.dense(x[None], x[None], torch.zeros(1, 6, 6, dtype=torch.bool)).output[0], layer.bias.expand(6, -1)
    )


def test_an_edge_that_is_given_twice_counts_twice() -> None:
    layer = shaken(GATv2Conv(4, 5, loops=False))
    with torch.no_grad():
        layer.att.zero_()
    x = randn(3, 4)
    y = layer(x, torch.tensor([[0, 0, 1], [2, 2, 2]]))
    k = layer.lin_l(x)
    torch.testing.assert_close(y[2], (2 * k[0] + k[1]) / 3 + layer.bias)


def test_scores_that_are_huge_stay_finite_and_half_precision_sums_in_float32() -> None:
    layer = GATv2Conv(4, 4, loops=False)
    with torch.no_grad():
        layer.att.fill_(1e4)
    edges = torch.stack([torch.arange(1, 3000), torch.zeros(2999, dtype=torch.long)])
    found = layer.attend(1e3 * randn(3000, 4).float(), edges)
    assert bool(found.output.isfinite().all())
    torch.testing.assert_close(found.weights.sum(), torch.tensor(1.0))
    half = GATv2Conv(4, 4, loops=False).bfloat16()
    with torch.no_grad():
        half.att.zero_()
    # a sum in bfloat16 would stop at 256 equal weights
    found = half.attend(torch.ones(3000, 4, dtype=torch.bfloat16), edges)
    torch.testing.assert_close(found.weights.float(), torch.full((2999, 1), 1 / 2999), rtol=1e-2, atol=0)
    expected = half.lin_l(torch.ones(4, dtype=torch.bfloat16)) + half.bias
    torch.testing.assert_close(found.output[0], expected, rtol=2e-2, atol=1e-2)


def test_without_a_it_is_the_mean_over_neighbours() -> None:
    layer = shaken(GATv2Conv(4, 5))
    with torch.no_grad():
        layer.att.zero_()
    x = randn(3, 4)
    y = layer(x, torch.tensor([[0, 1], [2, 2]]))
    torch.testing.assert_close(y[2], layer.lin_l(x).mean(0) + layer.bias)


def test_with_slope_1_scores_are_sums_and_attention_is_static() -> None:
    x = randn(1, 7, 4)
    seen = torch.ones(1, 7, 7, dtype=torch.bool)
    linear, curved = shaken(GATv2Conv(4, 5, 3, slope=1.0)), shaken(GATv2Conv(4, 5, 3, slope=0.01))
    q, k, _ = linear.projected(x, x)
    s, t = ((y * linear.att).sum(-1).mT for y in (q, k))
    scores = linear.dense_scores(q, k)
    torch.testing.assert_close(scores, s.unsqueeze(3) + t.unsqueeze(2))
    assert static_key(scores).all()
    torch.testing.assert_close(rank_agreement(scores), torch.ones(1, 3, dtype=torch.float64))
    weights = curved.dense(x, x, seen).weights
    assert bool((rank_agreement(weights) < 1).all())


def test_gat_is_static_whatever_it_is_given() -> None:
    layer, x = shaken(GATConv(4, 5, 8)), randn(1, 20, 4)
    q, k, _ = layer.projected(x, x)
    scores = layer.dense_scores(q, k)
    assert static_key(scores).all()
    assert bool((rank_agreement(scores) == 1).all())


def test_a_number_added_to_all_scores_of_a_target_changes_nothing() -> None:
    class Moved(GATv2Conv):
        def scores(self, q: Tensor, k: Tensor, edge: Tensor | None) -> Tensor:
            # targets have different queries, edges of one target the same
            return super().scores(q, k, edge) + 7 * q.sum(-1)

    layer = shaken(GATv2Conv(4, 5, 2))
    moved = Moved(4, 5, 2).double()
    moved.load_state_dict(layer.state_dict())
    x = randn(6, 4)
    torch.testing.assert_close(moved(x, EDGES), layer(x, EDGES), atol=1e-12, rtol=1e-12)


def test_nodes_in_another_order_come_out_in_that_order() -> None:
    layer, x = shaken(GATv2Conv(4, 5, 2)), randn(6, 4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(layer(x[order], order.argsort()[EDGES]), layer(x, EDGES)[order], atol=1e-12, rtol=1e-12)


def test_agreement_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    # pairs of rows: -1, (2 - 1) / 3, (1 - 2) / 3
    torch.testing.assert_close(rank_agreement(scores), torch.tensor(-1 / 3))
    mask = torch.tensor([[True, True, False]] * 3)
    torch.testing.assert_close(rank_agreement(scores, mask), torch.tensor(-1 / 3))
    assert not static_key(scores)
    assert static_key(scores, torch.tensor([[False, False, True]] * 3))
    assert rank_agreement(torch.ones(3, 4)) == 1


def test_what_does_not_fit_is_named() -> None:
    layer, x = GATv2Conv(4, 5), torch.zeros(3, 4)
    for call, said in (
        (lambda: layer(torch.zeros(3, 5), EDGES[:, :1]), "x: expected sources"),
        (lambda: layer(x, EDGES), "edge_index: expected nodes"),
        (lambda: layer(x, EDGES[:, :2], torch.zeros(2, 3)), "edge_attr: expected none"),
        (lambda: GATv2Conv(4, 5, edge_dim=2)(x, EDGES[:, :2]), "edge_attr: expected features"),
        (lambda: GATv2Conv((4, 3), 5, share_weights=True), "share_weights"),
        (lambda: GATv2Conv((4, 4), 5)((x, torch.zeros(2, 4)), torch.tensor([[0], [2]])), "targets from 0 to 1"),
    ):
        with pytest.raises(InputError, match=said):
            call()


@pytest.mark.parametrize("name", ["GCNConv", "GINConv"])
def test_layers_without_attention_are_pytorch_geometrics(name: str) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    kind: Any = {"GCNConv": GCNConv, "GINConv": GINConv}[name]
    ours = shaken(kind(4, 5))
    if name == "GINConv":
        theirs = geometric.GINConv(ours.mlp, train_eps=True).double()
        theirs.eps.data.copy_(ours.eps.data)
    else:
        theirs = geometric.GCNConv(4, 5).double()
        theirs.load_state_dict(ours.state_dict())
    x, edges = randn(6, 4), EDGES[:, EDGES[0] != EDGES[1]]
    torch.testing.assert_close(ours(x, edges), theirs(x, edges), atol=1e-12, rtol=1e-12)
    with pytest.raises(InputError, match="edge_attr"):
        ours(x, edges, randn(len(edges[0]), 2))


@pytest.mark.parametrize("conv", ["gatv2", "gat", "dot", "gcn", "gin"])
@pytest.mark.parametrize("readout", ["mean", "sum", "max", None])
def test_a_network_reads_graphs_apart_and_of_any_size(conv: Any, readout: Any) -> None:
    net = GraphAttentionNetwork(4, 5, 3, layers=2, heads=2, conv=conv, readout=readout).double().eval()
    x, other = randn(6, 4), randn(3, 4, seed=1)
    more = torch.tensor([[0, 1], [1, 2]])
    both = net(torch.cat([x, other]), torch.cat([EDGES, more + 6], 1), batch=torch.tensor([0] * 6 + [1] * 3))
    apart = [net(x, EDGES), net(other, more)]
    torch.testing.assert_close(both, torch.cat(apart))
    graphs = Graphs(torch.cat([x, other]), torch.tensor([0, 6, 9]), torch.cat([EDGES, more + 6], 1))
    torch.testing.assert_close(net(graphs), both)
    assert len(net.attend(x, EDGES)) == (2 if conv in ("gatv2", "gat", "dot") else 0)


def test_a_network_is_saved_with_its_settings(tmp_path: Path) -> None:
    net = GraphAttentionNetwork(
        4, 5, 3, heads=2, edge_dim=2, readout="sum", share_weights=True, dropout=0.3, residual=True
    )
    net.eval().save(tmp_path / "net")
    again = GraphAttentionNetwork.load(tmp_path / "net")
    x, attr = randn(6, 4).float(), randn(9, 2).float()
    assert torch.equal(again(x, EDGES, attr), net(x, EDGES, attr))
    assert again.settings == net.settings
    found = again.attend(x, EDGES, attr)[0]
    assert found.edge_index.shape[1] == len(found.weights)
    with pytest.raises(InputError, match="holds no"):
        GraphAttentionNetwork.load(tmp_path / "nothing")


def test_dictionaries_and_unseen_pairs() -> None:
    every = permutations(4)
    assert len(every) == len(set(map(tuple, every.tolist()))) == 24
    some = permutations(8, most=500)
    assert len(set(map(tuple, some.tolist()))) == 500
    split = unseen_combinations(every)
    assert len(split.train) + len(split.test) == 24
    seen = {(k, v) for row in split.train.tolist() for k, v in enumerate(row)}
    assert len(seen) <= round(16 * 0.8**0.25)
    assert all(any((k, v) not in seen for k, v in enumerate(row)) for row in split.test.tolist())
    with pytest.raises(InputError, match="share"):
        unseen_combinations(every, 0)


def test_looking_up_is_learned_by_gatv2_and_not_by_static_attention() -> None:
    def trained(conv: Any, **settings: Any) -> Lookup:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Lookup(4, 16, conv=conv, **settings)
        train_lookup(model, steps=100, batch=24, learning_rate=3e-2)
        return model

    orders = permutations(4)
    dynamic, static, linear = trained("gatv2"), trained("gat"), trained("gatv2", slope=1.0)
    assert lookup_accuracy(dynamic, orders) > 0.95
    assert lookup_accuracy(static, orders) < 0.7
    assert lookup_accuracy(linear, orders) < 0.7
    assert dynamic.agreement(orders) < 0.9
    assert static.agreement(orders) == 1
    assert linear.agreement(orders) > 0.999
    with pytest.raises(InputError, match="orders"):
        train_lookup(dynamic, orders[:, :3], steps=1)
