"""Marginals of edges under posteriors over structures, against lists of all structures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cenote.core import InputError
from cenote.mix.marginal_attention.families import (
    ContiguousWindow,
    IndependentEdges,
    MultiHop,
    OneParentPerQuery,
    OneQueryPerInput,
    SpanningTrees,
    Structure,
    SubsetOfParents,
    UncertainCount,
)
from cenote.mix.marginal_attention.layers import GraphPosterior, PosteriorAttention, PosteriorEncoder, SlotPosterior

N = 4
FAMILIES: dict[str, Structure] = {
    "one parent": OneParentPerQuery(),
    "one query": OneQueryPerInput(),
    "independent": IndependentEdges(),
    "two parents": SubsetOfParents(2),
    "uncertain": UncertainCount([-1.0, 0.5, 0.0, -2.0]),
    "window": ContiguousWindow([0.0, 0.5, -1.0], [0.1, 0.2, 0.0, -0.3]),
    "trees": SpanningTrees(),
    "rooted trees": SpanningTrees(rooted=True),
}
BY_ROW = ("one parent", "two parents", "uncertain", "window")


def potentials(n: int = N) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, n, dtype=torch.float64)


def rows_of(name: str, n: int = N) -> Iterator[tuple[Tensor, float]]:
    """What one query may be joined to, and the logarithm of its prior but for a constant."""
    for chosen in itertools.product((0.0, 1.0), repeat=n):
        row, count = torch.tensor(chosen, dtype=torch.float64), int(sum(chosen))
        at = row.nonzero().flatten()
        if (name == "one parent" and count == 1) or (name == "two parents" and count == 2):
            yield row, 0.0
        if name == "uncertain" and count < 4:
            yield row, [-1.0, 0.5, 0.0, -2.0][count] - math.log(math.comb(n, count))
        if name == "window" and 0 < count < 4 and int(at[-1] - at[0]) == count - 1:
            yield row, [0.0, 0.5, -1.0][count - 1] + [0.1, 0.2, 0.0, -0.3][int(at[0])]


def structures(name: str, n: int = N) -> Iterator[tuple[Tensor, float]]:
    """Every structure, as a matrix, and its prior."""
    if name in BY_ROW:
        for rows in itertools.product(list(rows_of(name, n)), repeat=n):
            yield torch.stack([r for r, _ in rows]), sum(p for _, p in rows)
    elif name == "one query":
        yield from ((m.T, p) for m, p in structures("one parent", n))
    elif name == "independent":
        for chosen in itertools.product((0.0, 1.0), repeat=n * n):
            yield torch.tensor(chosen, dtype=torch.float64).view(n, n), 0.0
    else:
        rooted = name == "rooted trees"
        pairs = [(i, j) for i in range(n) for j in range(n) if (i != j if rooted else i < j)]
        for edges in itertools.combinations(pairs, n - 1):
            joined = torch.zeros(n, n, dtype=torch.float64)
            joined[[i for i, _ in edges], [j for _, j in edges]] = 1
            one_way = joined.sum(1).max() <= 1
            both = ((joined + joined.T) > 0).double()
            if bool((torch.linalg.matrix_power(both + torch.eye(n), n) > 0).all()) and (one_way or not rooted):
                yield joined if rooted else both, 0.0


@pytest.fixture(scope="module")
def listed() -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name in FAMILIES:
        n = 3 if name in ("independent", "uncertain", "two parents") else N
        held = list(structures(name, n))
        found[name] = torch.stack([m for m, _ in held]), torch.tensor([p for _, p in held], dtype=torch.float64)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_marginals_and_evidence_are_those_of_the_list_of_all_structures(
    name: str, listed: dict[str, tuple[Tensor, Tensor]]
) -> None:
    matrices, prior = listed[name]
    f = potentials(matrices.shape[-1])
    log = (matrices * f).sum((1, 2)) + prior
    weights = log.softmax(0)
    found = FAMILIES[name](f)
    torch.testing.assert_close(found.marginals, torch.einsum("s,sij->ij", weights, matrices))
    torch.testing.assert_close(found.log_evidence, log.logsumexp(0) - prior.logsumexp(0))
    best = matrices[log.argmax()]
    if name != "independent":
        assert torch.equal(FAMILIES[name].mode(f).double(), best)
    assert torch.equal(FAMILIES[name].mode(1e3 * f), FAMILIES[name](1e3 * f).marginals > 0.5)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
def test_a_temperature_divides_the_prior_of_the_counts_too(temperature: float) -> None:
    f, log_counts = torch.tensor([[0.5, 0.2, -1.0]]).double(), [0.0, -5.0, -5.0]
    family = UncertainCount(log_counts, temperature=temperature)
    of_edges = torch.tensor([[0.3, -0.2, 0.6]]).double()
    sets = [chosen for chosen in itertools.product((0.0, 1.0), repeat=3) if sum(chosen) < 3]
    rows = torch.tensor(sets, dtype=torch.float64)
    within = (rows * of_edges).sum(1)
    of_size = [within[rows.sum(1) == k].logsumexp(0) for k in range(3)]
    prior = torch.stack([log_counts[int(n)] + w - of_size[int(n)] for n, w in zip(rows.sum(1), within, strict=True)])
    log = ((rows * f).sum(1) + prior) / temperature
    found = family(f, of_edges)
    torch.testing.assert_close(found.marginals[0], log.softmax(0) @ rows)
    torch.testing.assert_close(found.log_evidence, log.logsumexp(0) - (prior / temperature).logsumexp(0))
    assert torch.equal(family.mode(f, of_edges)[0].double(), rows[log.argmax()])
    assert not family.mode(f).any()
    drawn = family.sample(f.expand(4000, -1, -1), of_edges, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn.mean(0), found.marginals, atol=0.03, rtol=0)
    theta = f / temperature
    one = family.drawn(theta.expand(4000, -1, -1), torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(one.mean(0), family(f).marginals, atol=0.03, rtol=0)


def test_a_count_that_no_query_can_have_is_refused() -> None:
    exactly_two = UncertainCount([-math.inf, -math.inf, 0.0])
    f = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for ask in (exactly_two, exactly_two.mode, exactly_two.sample):
        with pytest.raises(InputError, match="log_counts: a query may read 1 inputs"):
            ask(f, mask=mask)
    found = exactly_two(f, mask=torch.tensor([[True, True, False], [False] * 3]))
    assert found.marginals.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert float(found.log_evidence.detach()) == pytest.approx(0.0)
    assert torch.autograd.grad(found.log_evidence, f)[0].isfinite().all()
    assert exactly_two.mode(f, mask=torch.tensor([[True, True, False], [False] * 3])).sum() == 2


@pytest.mark.parametrize("name", [*FAMILIES, "hops", "hops of windows"])
def test_a_family_says_whether_the_order_matters(name: str) -> None:
    hops = {"hops": MultiHop(OneParentPerQuery(), 2), "hops of windows": MultiHop(ContiguousWindow(), 2)}
    family = {**FAMILIES, **hops}[name]
    torch.manual_seed(0)
    layer, x, order = PosteriorAttention(8, family).double(), torch.randn(1, N, 8).double(), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(layer(x[:, order]), layer(x)[:, order]) != layer.order_matters


@pytest.mark.parametrize("name", FAMILIES)
def test_marginals_are_the_gradient_of_the_evidence(name: str) -> None:
    f, prior = potentials(5).requires_grad_(), torch.randn(5, 5, dtype=torch.float64)
    found = FAMILIES[name](f, prior) if name != "window" else ContiguousWindow()(f, prior)
    gradient = torch.autograd.grad(found.log_evidence, f)[0]
    torch.testing.assert_close(gradient, found.marginals, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_pass_through_the_marginals(name: str) -> None:
    f = potentials(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: FAMILIES[name](t).marginals, (f,))


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_as_frequent_as_the_marginals_say(name: str) -> None:
    f, generator = potentials(3), torch.Generator().manual_seed(0)
    count = 300 if "tree" in name else 4000
    drawn = FAMILIES[name].sample(f.expand(count, 3, 3), generator=generator)
    seen, expected = drawn.double().mean(0), FAMILIES[name](f).marginals
    assert bool(((seen - expected).abs() < 5 * (0.25 / count) ** 0.5).all())


def test_with_dot_products_and_a_uniform_prior_it_is_the_transformers_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    family = OneParentPerQuery()
    found = family.attended(family(q @ k.mT / 2, mask=causal).marginals, v)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, attn_mask=causal))


def test_of_a_bilinear_potential_the_gradient_in_a_query_is_what_it_attends_to() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    queries = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    family = OneParentPerQuery()
    found = family(queries @ w @ x.T)
    gradient = torch.autograd.grad(found.log_evidence, queries)[0]
    torch.testing.assert_close(gradient, family.attended(found.marginals, x @ w.T))


def test_a_gradient_step_on_the_energy_is_hopfield_retrieval() -> None:
    torch.manual_seed(0)
    patterns = torch.randn(6, 4, dtype=torch.float64)
    state = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    energy = 0.5 * state.square().sum() - OneParentPerQuery().log_sum(state @ patterns.T)
    step = state - torch.autograd.grad(energy, state)[0]
    torch.testing.assert_close(step, (state @ patterns.T).softmax(-1) @ patterns)


@pytest.mark.parametrize("name", ["one parent", "two parents", "uncertain", "window", "independent"])
def test_a_query_whose_prior_is_all_impossible_gives_zeros(name: str) -> None:
    f = potentials().requires_grad_()
    prior = torch.zeros(N, N, dtype=torch.float64)
    prior[1] = -math.inf
    found = FAMILIES[name](f, prior)
    assert not found.marginals[1].any()
    torch.testing.assert_close(found.marginals[[0, 2, 3]], FAMILIES[name](f[[0, 2, 3]]).marginals)
    torch.testing.assert_close(found.log_evidence, FAMILIES[name](f[[0, 2, 3]]).log_evidence)
    found.marginals.sum().backward()
    assert bool(f.grad.isfinite().all())
    assert not FAMILIES[name].attended(found.marginals, f)[1].any()
    assert not FAMILIES[name].mode(f, prior)[1].any()
    assert not FAMILIES[name].sample(f, prior)[1].any()


@pytest.mark.parametrize("name", ["one parent", "two parents"])
def test_a_constant_added_to_a_query_changes_nothing(name: str) -> None:
    f = potentials()
    moved = f + torch.tensor([1.0, -3.0, 50.0, 0.0])[:, None]
    torch.testing.assert_close(FAMILIES[name](moved).marginals, FAMILIES[name](f).marginals)


def test_one_parent_is_softmax_all_parents_are_ones_and_more_are_refused() -> None:
    f = potentials()
    torch.testing.assert_close(SubsetOfParents(1)(f).marginals, f.softmax(-1))
    torch.testing.assert_close(SubsetOfParents(N)(f).marginals, torch.ones_like(f))
    with pytest.raises(InputError, match="k: 5 parents, and a query may read 4 inputs"):
        SubsetOfParents(5)(f)
    with pytest.raises(InputError, match="k: 2 parents, and a query may read 1 inputs"):
        SubsetOfParents(2)(f, mask=torch.ones(N, N, dtype=torch.bool).tril())
    with pytest.raises(InputError, match="trees join the same nodes"):
        SpanningTrees()(f[:2])


@pytest.mark.parametrize("family", [OneParentPerQuery, OneQueryPerInput, IndependentEdges, SpanningTrees])
def test_towards_temperature_zero_only_the_mode_is_left(family: type[Structure]) -> None:
    f = potentials()
    torch.testing.assert_close(family(temperature=1e-3)(f).marginals, family().mode(f).double())


def test_three_nodes_have_three_trees() -> None:
    f = potentials(3)
    edge = f + f.T
    a, b, c = edge[0, 1], edge[1, 2], edge[0, 2]
    weights = torch.stack([a + b, b + c, a + c]).softmax(0)
    found = SpanningTrees()(f).marginals
    torch.testing.assert_close(found[0, 1], weights[0] + weights[2])
    torch.testing.assert_close(found[1, 2], weights[0] + weights[1])
    torch.testing.assert_close(found[2, 0], weights[1] + weights[2])


@pytest.mark.parametrize("rooted", [False, True])
def test_trees_leave_out_what_is_no_node(rooted: bool) -> None:
    f, family = potentials(5), SpanningTrees(rooted)
    real = torch.tensor([False, True, True, False, True])
    found = family(f, mask=real[:, None] & real)
    alone = family(f[real][:, real])
    torch.testing.assert_close(found.marginals[real][:, real], alone.marginals)
    torch.testing.assert_close(found.log_evidence, alone.log_evidence)
    assert found.marginals.sum() == pytest.approx(float(alone.marginals.sum()))
    assert torch.equal(family.mode(f, mask=real[:, None] & real)[real][:, real], family.mode(f[real][:, real]))


def test_hops_are_products_and_the_gradient_of_what_is_read_at_the_end() -> None:
    f = potentials()
    walk = MultiHop(OneParentPerQuery(), 3)
    a = f.softmax(-1)
    torch.testing.assert_close(walk(f).marginals, a @ a @ a)
    paths = torch.zeros(N, N, dtype=torch.float64)
    for i, j, k, end in itertools.product(range(N), repeat=4):
        paths[i, end] += a[i, j] * a[j, k] * a[k, end]
    torch.testing.assert_close(walk(f).marginals, paths)
    read = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.functional.jacobian(lambda r: walk.log_end(f, r), read)
    torch.testing.assert_close(gradient, walk(f).marginals, rtol=1e-10, atol=0)
    drawn = walk.sample(f.expand(3000, N, N), generator=torch.Generator().manual_seed(0))
    assert bool(((drawn.double().mean(0) - paths).abs() < 0.05).all())
    assert bool((walk.mode(f).sum(-1) == 1).all())


def test_competing_queries_are_given_means() -> None:
    f, v = potentials(), torch.randn(N, 3, dtype=torch.float64)
    family = OneQueryPerInput()
    weights = f.softmax(0)
    torch.testing.assert_close(family.attended(family(f).marginals, v), weights @ v / weights.sum(1, keepdim=True))
    of_edges = v.expand(N, N, 3)
    torch.testing.assert_close(family.attended(weights, of_edges), family.attended(weights, v))


def test_large_potentials_and_long_rows_stay_finite() -> None:
    torch.manual_seed(0)
    f = (200 * torch.randn(1, 64)).requires_grad_()
    for family in (SubsetOfParents(8), UncertainCount.at_most(8), ContiguousWindow()):
        found = family(f)
        assert bool(found.marginals.isfinite().all())
        assert found.marginals.dtype == torch.float32
        (found.marginals * torch.randn(64)).sum().backward()
        assert bool(f.grad.isfinite().all())
    assert SubsetOfParents(8)(f).marginals.sum().item() == pytest.approx(8)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "window"])
def test_layers_of_every_family_leave_padding_out_and_learn(name: str) -> None:
    torch.manual_seed(0)
    layer = PosteriorAttention(8, FAMILIES[name], heads=2, prior="distances").double()
    torch.nn.init.normal_(layer.distances)
    x, mask = torch.randn(2, 5, 8).double(), torch.tensor([[True] * 5, [False, True, True, True, False]])
    x[~mask] = math.nan
    y = layer(x, mask)
    torch.testing.assert_close(y[1:, mask[1]], layer(x[1:, mask[1]]))
    y.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in layer.parameters() if p.requires_grad)


def test_a_layer_of_one_parent_is_a_transformers() -> None:
    torch.manual_seed(0)
    layer, x = PosteriorAttention(8, heads=2), torch.randn(2, 5, 8)
    q, k, v = (m(x).view(2, 5, 2, 4).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
    expected = layer.output(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weights_of(x).sum(-1), torch.ones(2, 2, 5))
    order = torch.randperm(5)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_an_encoder_takes_a_family_per_layer_and_tells_its_evidence() -> None:
    torch.manual_seed(0)
    learned = UncertainCount([0.0, 0.0, 0.0], learned=True)
    families = [SubsetOfParents(2), learned, ContiguousWindow(), OneParentPerQuery()]
    model = PosteriorEncoder(8, families, heads=2, prior="distances")
    x, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True, True, True, False, False]])
    y, evidence = model(x, mask)
    alone, own = model(x[1:, :3])
    torch.testing.assert_close(y[1:, :3], alone)
    torch.testing.assert_close(evidence[1:], own)
    (y.square().mean() - evidence.mean()).backward()
    assert bool(learned.log_counts.grad.any())
    with pytest.raises(InputError, match="families"):
        PosteriorEncoder(8, [])


def test_graphs_are_a_prior() -> None:
    torch.manual_seed(0)
    layer, x = GraphPosterior(8, heads=2, loops=False), torch.randn(1, 4, 8)
    edges = torch.tensor([[[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]]).bool()
    found = layer.over(x, edges)
    torch.testing.assert_close(found[:, 0], layer.output(layer.value(x[:, 1])))
    torch.testing.assert_close(found[:, 2], layer.output.bias[None])
    full = layer.over(x, torch.ones_like(edges))
    torch.testing.assert_close(full, layer(x))


def test_slots_are_steps_of_soft_k_means() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1, 20, 2) * 0.1 + 3, torch.randn(1, 20, 2) * 0.1 - 3], 1)
    start = torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]])
    model = SlotPosterior(2, 2, sigma=0.5, steps=5)
    found = model(x, start=start)
    torch.testing.assert_close(found.slots[0], torch.stack([x[0, :20].mean(0), x[0, 20:].mean(0)]))
    torch.testing.assert_close(found.belongs.sum(1), torch.ones(1, 40))
    one = SlotPosterior(2, 2, sigma=0.5, steps=1)(x, start=start).slots
    log = -torch.cdist(start, x).square() / (2 * 0.25)
    weights = log.softmax(1)
    torch.testing.assert_close(one, weights @ x / weights.sum(-1, keepdim=True))
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 20:] = False
    torch.testing.assert_close(model(x, mask, start).slots[0, 0], x[0, :20].mean(0))
    learned = SlotPosterior(3, 2, learned=True)
    learned(x).slots.sum().backward()
    assert learned.update.weight_ih.grad is not None
