import math

import pytest
import torch
from tests.pools import dense_attention, features, shaken

from cenote.core import Bags, InputError
from cenote.pool.attention.tree_cross_attention.objective import TreeObjective
from cenote.pool.attention.tree_cross_attention.pool import TreeCrossAttentionPool
from cenote.pool.attention.tree_cross_attention.retreever import ReTreever
from cenote.pool.attention.tree_cross_attention.search import TreeCrossAttention
from cenote.pool.attention.tree_cross_attention.training import mirrored_copy, train_retreever
from cenote.pool.attention.tree_cross_attention.tree import Tree, tree_shape

SIZES = [(8, 2), (13, 2), (11, 3), (28, 3), (5, 4), (9, 8)]


def built(tokens: int, b: int, **settings: object) -> tuple[TreeCrossAttention, torch.Tensor, torch.Tensor, Tree]:
    tca = shaken(TreeCrossAttention(8, 2, 12, b, **settings))
    x, query = features(3, tokens, 8), features(3, 4, 8, seed=2)
    return tca, x, query, tca.build(x)


def attended(tca: TreeCrossAttention, query: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """`FF(Attention(LN(q), nodes) + LN(q) + q)`, with every node projected."""
    a, n = tca.query_model, tca.query_model.norm(query)
    out, _ = dense_attention(a.to_q(n), a.to_k(nodes), a.to_v(nodes), 2)
    return tca.query_ff(a.to_out(out) + n + query)


def below(tree: Tree, level: int, node: int, item: int) -> list[int]:
    """The real tokens below a node."""
    each = tree.tokens.shape[1] // tree.nodes[level].shape[1]
    return [t for t in tree.tokens[item, node * each : (node + 1) * each].tolist() if t >= 0]


def test_shape_is_the_integer_logarithm() -> None:
    for b in (2, 3, 5, 10):
        for tokens in (*range(1, 40), 3**5, 3**5 + 1, 5**4, 5**4 + 1, 10**6, 10**6 + 1):
            k, p = tree_shape(tokens, b)
            assert b**k <= max(tokens - 1, 1) < b ** (k + 1)
            assert p == math.ceil(tokens / b**k) <= b
    with pytest.raises(InputError, match="branch_factor"):
        tree_shape(8, 1)


@pytest.mark.parametrize(("tokens", "b"), SIZES)
def test_a_walk_done_by_hand(tokens: int, b: int) -> None:
    tca, _, query, tree = built(tokens, b)
    found = tca.attend(query, tree)
    attention = tca.query_model
    for item in range(3):
        for j in range(4):
            node, kept, log_prob, entropies, path = 0, [], 0.0, [], []
            q = query[item : item + 1, j : j + 1]
            for level in range(1, tree.levels + 1):
                children = [node * b + c for c in range(b)]
                children = [c for c in children if below(tree, level, c, item)]
                keys = tree.nodes[level][item : item + 1, children]
                _, weights = dense_attention(attention.to_q(attention.norm(q)), attention.to_k(keys), keys, 2)
                policy = weights[0, :, 0].mean(0)
                best = int(policy.argmax())
                log_prob += math.log(float(policy[best].detach()))
                entropies.append(float(-(weights * weights.log()).sum(-1).mean()))
                kept += [(level, c) for i, c in enumerate(children) if i != best]
                node = children[best]
                path.append(node % b)
            leaves = tree.tokens.shape[1] // b**tree.levels
            kept += [
                (tree.levels + 1, c)
                for c in range(node * leaves, (node + 1) * leaves)
                if below(tree, tree.levels + 1, c, item)
            ]
            nodes = torch.stack([tree.nodes[level][item, c] for level, c in kept]).unsqueeze(0)
            torch.testing.assert_close(found.output[item, j], attended(tca, q, nodes)[0, 0])
            assert found.choices[item, j].tolist() == path
            assert float(found.log_prob[item, j]) == pytest.approx(log_prob)
            assert float(found.entropy[item, j]) == pytest.approx(sum(entropies) / max(len(path), 1), abs=1e-7)
            assert int(found.read()[item, j]) == len(kept)
            # every token stands below exactly one of the vectors that were read
            assert sorted(t for level, c in kept for t in below(tree, level, c, item)) == list(range(tokens))


@pytest.mark.parametrize(("tokens", "b"), [(256, 2), (81, 3), (64, 4)])
def test_number_of_vectors_read(tokens: int, b: int) -> None:
    tca, _, query, tree = built(tokens, b)
    k, p = tree_shape(tokens, b)
    assert tca.attend(query, tree).read().unique().tolist() == [(b - 1) * k + p]
    if (tokens, b) == (256, 2):
        assert (b - 1) * k + p == 9


def test_few_tokens_are_read_whole() -> None:
    for tokens in (1, 2, 4):
        tca, x, query, tree = built(tokens, 4)
        found = tca.attend(query, tree)
        torch.testing.assert_close(found.output, attended(tca, query, x))
        torch.testing.assert_close(found.output, tca.full(query, tree))
        assert found.read().unique().tolist() == [tokens]


@pytest.mark.parametrize(("tokens", "b"), SIZES)
def test_full_attention_sees_the_real_tokens(tokens: int, b: int) -> None:
    tca, x, query, tree = built(tokens, b)
    torch.testing.assert_close(tca.full(query, tree), attended(tca, query, x))


@pytest.mark.parametrize("b", [2, 3])
def test_padding_and_batch_mates_change_nothing(b: int) -> None:
    tca, x, query, _ = built(17, b)
    lengths = (17, 9, 2)
    mask = torch.arange(17) < torch.tensor(lengths).unsqueeze(1)
    tree = tca.build(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    found = tca.attend(query, tree)
    for i, n in enumerate(lengths):
        own = tca.build(x[i : i + 1, :n])
        alone = tca.attend(query[i : i + 1], own)
        torch.testing.assert_close(found.output[i : i + 1], alone.output)
        torch.testing.assert_close(found.log_prob[i : i + 1], alone.log_prob)
        torch.testing.assert_close(found.entropy[i : i + 1], alone.entropy, atol=1e-7, rtol=0)
        assert torch.equal(found.read()[i : i + 1], alone.read())
        torch.testing.assert_close(tca.full(query, tree)[i : i + 1], tca.full(query[i : i + 1], own))
        torch.testing.assert_close(
            tca.token_weights(found, tree, 17)[i : i + 1, ..., :n], tca.token_weights(alone, own, n)
        )


def test_the_order_of_the_batch_is_that_of_the_results() -> None:
    tca, x, query, tree = built(9, 8)
    order = torch.tensor([2, 0, 1])
    mask = torch.arange(9) < torch.tensor([[9], [8], [4]])
    for whole, turned in ((tree, tca.build(x[order])), (tca.build(x, mask), tca.build(x[order], mask[order]))):
        torch.testing.assert_close(tca.attend(query[order], turned).output, tca.attend(query, whole).output[order])
        torch.testing.assert_close(tca.full(query[order], turned), tca.full(query, whole)[order])


def test_token_weights_share_a_summary_among_its_tokens() -> None:
    tca, _, query, tree = built(11, 3)
    found = tca.attend(query, tree)
    weights = tca.token_weights(found, tree, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 2, dtype=torch.float64))
    sizes = [3] * tree.levels + [tree.tokens.shape[1] // 9]
    levels = [level for level, size in enumerate(sizes, 1) for _ in range(size)]
    expected = torch.zeros_like(weights)
    for s, level in enumerate(levels):
        for item, j in ((i, j) for i in range(3) for j in range(4)):
            parts = {int(found.nodes[item, j, s]): 1.0}
            for deeper in range(level + 1, tree.levels + 2):
                size = sizes[deeper - 1]
                inner = {
                    n: [n * size + c for c in range(size) if below(tree, deeper, n * size + c, item)] for n in parts
                }
                parts = {c: parts[n] / len(cs) for n, cs in inner.items() for c in cs}
            for leaf, share in parts.items():
                if (token := int(tree.tokens[item, leaf])) >= 0:
                    expected[item, j, :, token] += share * found.weights[item, j, :, s]
    torch.testing.assert_close(weights, expected)


def test_sampled_ways_follow_the_policy() -> None:
    torch.manual_seed(0)
    tca, _, query, tree = built(4, 2)
    assert tree.levels == 1
    many = query[:, :1].expand(-1, 4000, -1)
    found = tca.attend(many, tree, sample=True)
    share = found.choices[..., 0].double().mean(1)
    right = torch.where(found.choices[..., 0] == 1, found.log_prob.exp(), 1 - found.log_prob.exp())
    torch.testing.assert_close(share, right.mean(1), atol=0.03, rtol=0)


def test_without_bptt_children_learn_nothing_from_their_summaries() -> None:
    for bptt, reached in ((True, True), (False, False)):
        tca, _, _, _ = built(8, 2, bptt=bptt)
        x = features(1, 8, 8).requires_grad_()
        root = tca.build(x).nodes[0].sum()
        (grad,) = torch.autograd.grad(root, x, allow_unused=True, materialize_grads=True)
        assert bool(grad.any()) == reached
        (weight,) = torch.autograd.grad(tca.build(x).nodes[0].square().sum(), tca.aggregator[0].ff.fc1.weight)
        assert weight.any()


def test_ordered_tree_does_not_see_the_order_of_the_context() -> None:
    context, queries = features(2, 13, 3), features(2, 4, 5, seed=2)
    shuffled = context[:, torch.randperm(13)]
    for order, same in ((1, True), ("projection", True), ("none", False)):
        model = shaken(ReTreever(3, 5, 2, dim=8, heads=2, encoder_layers=1, order=order))
        assert torch.allclose(model(context, queries), model(shuffled, queries)) == same
        torch.testing.assert_close(model.full(context, queries), model.full(shuffled, queries))


def test_objective_is_its_equation() -> None:
    model = shaken(ReTreever(3, 5, 4, dim=8, heads=2, encoder_layers=1))
    context, queries, target = features(2, 13, 3), features(2, 6, 5, seed=2), torch.arange(12).view(2, 6) % 4
    for reward in ("acc", "nce"):
        objective = TreeObjective("classification", reward, ca_weight=0.5, rl_weight=2.0, entropy_bonus=0.1)
        torch.manual_seed(3)
        losses = objective(model, context, queries, target)
        torch.manual_seed(3)
        found = model.ask(queries, model.encode(context), sample=True)
        logits = model.predictor(found.output)
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(2, 6)
        r = (logits.argmax(-1) == target).double() if reward == "acc" else math.log(4) - ce.detach()
        rl = -(found.log_prob * r).mean() - 0.1 * found.entropy.mean()
        full = model.full(context, queries)
        ca = torch.nn.functional.cross_entropy(full.flatten(0, 1), target.flatten())
        torch.testing.assert_close(losses.total, ce.mean() + 0.5 * ca + 2.0 * rl)
        # policy parameters learn from the reward alone where nothing else is weighed
        got = torch.autograd.grad(losses.total, model.tca.query_model.to_q.weight)
        expected = torch.autograd.grad(ce.mean() + 0.5 * ca + 2.0 * rl, model.tca.query_model.to_q.weight)
        torch.testing.assert_close(got, expected)
        assert losses.read == found.read().double().mean()


def test_regression_losses() -> None:
    target = torch.tensor([[[0.5], [1.0]]])
    prediction = torch.tensor([[[0.0], [1.0]]])
    objective = TreeObjective("regression")
    losses = objective.losses(prediction, target)
    assert losses.tolist() == [[0.25, 0.0]]
    assert objective.rewards(prediction, target, losses)[0].tolist() == [[-0.25, 0.0]]
    wide = torch.tensor([[[0.0, 1.0], [1.0, -2.0]]])
    std = 0.05 + 0.95 * torch.nn.functional.softplus(wide[..., 1:])
    expected = -torch.distributions.Normal(wide[..., :1], std).log_prob(target).sum(-1)
    torch.testing.assert_close(TreeObjective("gaussian").losses(wide, target), expected)


@pytest.mark.parametrize(("tokens", "b"), SIZES)
def test_routing_is_right_where_the_opened_node_holds_the_token(tokens: int, b: int) -> None:
    tca, x, query, _ = built(tokens, b)
    lengths = (tokens, tokens - 1, 2)
    mask = torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)
    tree = tca.build(x, mask)
    found = tca.attend(query, tree)
    wanted = torch.tensor([[(3 * j + i) % n for j in range(4)] for i, n in enumerate(lengths)])
    right = tca.routed(found, tree, wanted)
    assert right.shape == (3, 4, tree.levels)
    for i, j in ((i, j) for i in range(3) for j in range(4)):
        node = 0
        for level in range(1, tree.levels + 1):
            node = node * b + int(found.choices[i, j, level - 1])
            assert bool(right[i, j, level - 1]) == (int(wanted[i, j]) in below(tree, level, node, i))
    for outside in (tokens, -1):
        with pytest.raises(InputError, match="wanted"):
            tca.routed(found, tree, torch.full_like(wanted, outside))


def test_measures_are_those_of_the_best_way() -> None:
    model = shaken(ReTreever(3, 5, 4, dim=8, heads=2, encoder_layers=1))
    context, queries, target = features(2, 13, 3), features(2, 6, 5, seed=2), torch.arange(12).view(2, 6) % 4
    wanted = torch.arange(12).view(2, 6)
    got = TreeObjective("classification").measure(model, context, queries, target, wanted=wanted)
    tree = model.encode(context)
    found, logits = model.ask(queries, tree), model(context, queries)
    assert got.accuracy == float((logits.argmax(-1) == target).double().mean())
    likelihood = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).mean()
    assert got.log_likelihood == pytest.approx(float(likelihood.detach()))
    assert got.read == pytest.approx(float(found.read().double().mean()) / 13)
    assert got.routing == tuple(model.tca.routed(found, tree, wanted).double().mean((0, 1)).tolist())
    plain = TreeObjective("regression").measure(model, context, queries, features(2, 6, 4))
    assert (plain.accuracy, plain.log_likelihood, plain.routing) == (None, None, None)


def test_training_finds_the_way() -> None:
    """Which of 8 tokens carries the answer is written in the query: the search must learn to open its branch."""
    torch.manual_seed(0)
    places = torch.eye(8)
    model = ReTreever(10, 8, 2, dim=16, heads=2, encoder_layers=0, bptt=True)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    objective = TreeObjective("classification")
    for _ in range(150):
        bits = torch.randint(2, (32, 8))
        context = torch.cat([places.expand(32, 8, 8), torch.nn.functional.one_hot(bits, 2)], -1)
        losses = objective(model, context, places.expand(32, 8, 8), bits)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
    model.eval()
    right = (model(context, places.expand(32, 8, 8)).argmax(-1) == bits).double().mean()
    assert right > 0.75
    found = model.ask(places.expand(32, 8, 8), model.encode(context))
    # a leaf that is opened holds the token that was asked for
    held = (found.nodes[..., -2:] == torch.arange(8).view(1, 8, 1)).any(-1).double().mean()
    assert held > 0.5


def test_pool_takes_bags_and_weighs_tokens() -> None:
    pool = shaken(TreeCrossAttentionPool(8, queries=3, branch_factor=3))
    x = features(2, 11, 8)
    output, weights = pool.attend(x)
    assert output.shape == (2, 3, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 12, dtype=torch.float64)[:, : weights.shape[1]])
    torch.testing.assert_close(pool(Bags.from_padded(x)), output)
    assert TreeCrossAttentionPool(8, order="none").permutation_invariant is False


def test_errors() -> None:
    tca, x, query, tree = built(8, 2)
    for call, name in (
        (lambda: TreeCrossAttention(8, branch_factor=1), "branch_factor"),
        (lambda: TreeCrossAttention(8, heads=3), "heads"),
        (lambda: TreeCrossAttention(8, num_aggregation_layers=-1), "num_aggregation_layers"),
        (lambda: tca.build(x, by=x), "by"),
        (lambda: tca(query[:1], tree), "query"),
        (lambda: ReTreever(3, 2, 1, order=3), "order"),
        (lambda: ReTreever(3, 2, 1, encoder_layers=-1), "encoder_layers"),
        (lambda: TreeObjective("ranking"), "task"),
        (lambda: TreeObjective("classification", "mse"), "reward"),
        (lambda: TreeCrossAttentionPool(8, queries=0), "queries"),
        (lambda: TreeCrossAttentionPool(8, order="sorted"), "order"),
    ):
        with pytest.raises(InputError, match=name):
            call()


def test_without_layers_a_node_is_the_mean_of_its_children() -> None:
    tca = TreeCrossAttention(8, 2, branch_factor=2, num_aggregation_layers=0).double()
    x = features(3, 8, 8)
    root, inner = tca.build(x).nodes[0], tca.build(x).nodes[1]
    torch.testing.assert_close(root[:, 0], x.mean(1))
    torch.testing.assert_close(inner, torch.stack([x[:, :4].mean(1), x[:, 4:].mean(1)], 1))


def test_deviation_can_be_exponential() -> None:
    objective = TreeObjective("gaussian", deviation="exp")
    prediction, target = features(2, 3, 2), features(2, 3, 1, seed=2)
    normal = torch.distributions.Normal(prediction[..., :1], prediction[..., 1:].exp())
    torch.testing.assert_close(objective.losses(prediction, target), -normal.log_prob(target).squeeze(-1))
    with pytest.raises(InputError, match="deviation"):
        TreeObjective("gaussian", deviation="relu")


def test_the_recipe_learns_to_copy_a_few_digits() -> None:
    torch.manual_seed(0)
    model, objective = ReTreever(14, 4, out_dim=10, dim=16, encoder_layers=0), TreeObjective("classification")
    generator = torch.Generator().manual_seed(0)
    test = mirrored_copy(4, 64, generator)
    history = train_retreever(
        model,
        objective,
        lambda: mirrored_copy(4, 32, generator),
        steps=250,
        lr=0.01,
        score=lambda: objective.measure(model, *test).accuracy or 0.0,
        score_every=1,
    )
    assert [len(history.losses), len(history.scores)] == [3, 3]
    assert max(history.scores) > 0.5
    assert objective.measure(model, *test).accuracy == max(history.scores)
    with pytest.raises(InputError, match="length: expected an even number"):
        mirrored_copy(5, 2)
