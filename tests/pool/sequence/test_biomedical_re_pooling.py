from __future__ import annotations

import copy

import pytest
import torch
from tests.pools import features, shaken

from cenote.core import InputError
from cenote.pool import ABMIL, DependencyPool, DynamicPool, EntityPool, IndexSetPool, SentencePool

TOKENS, DIM = 9, 6
SUBJECT, OBJECT = torch.tensor([[1, 3], [5, 6]]), torch.tensor([[6, 7], [0, 2]])
CHAIN = torch.arange(-1, TOKENS - 1).expand(2, TOKENS)
STAR = torch.tensor([4, 4, 4, 4, -1, 4, 4, 4, 4]).expand(2, TOKENS)
ALL = [
    lambda reduce: EntityPool(DIM, reduce=reduce),
    lambda reduce: EntityPool(DIM, sentence=False, reduce=reduce),
    lambda reduce: EntityPool(DIM, head_word=True, reduce=reduce),
    lambda reduce: SentencePool(DIM, reduce=reduce),
    lambda reduce: DynamicPool(DIM, reduce=reduce),
    lambda reduce: DynamicPool(DIM, pieces=5, reduce=reduce),
    lambda reduce: DependencyPool(DIM, reduce=reduce),
    lambda reduce: DependencyPool(DIM, k=1, entities=False, reduce=reduce),
    lambda reduce: DependencyPool(DIM, k=None, reduce=reduce),
]


def words() -> torch.Tensor:
    return features(2, TOKENS, DIM)


def test_entities_and_sentence() -> None:
    x = words()
    y = EntityPool(DIM)(x, SUBJECT, OBJECT).unflatten(1, (3, DIM))
    torch.testing.assert_close(y[0], torch.stack([x[0, 1:3].amax(0), x[0, 6], x[0].amax(0)]))
    torch.testing.assert_close(y[1], torch.stack([x[1, 5], x[1, 0:2].amax(0), x[1].amax(0)]))
    only = EntityPool(DIM, sentence=False, reduce="mean")(x, SUBJECT, OBJECT)
    torch.testing.assert_close(only[0], torch.cat([x[0, 1:3].mean(0), x[0, 6]]))


def test_the_head_word_of_a_mention_alone() -> None:
    x = words()
    # words 1 and 2 hang on each other; the span's head is the one whose head lies outside
    heads = torch.tensor([[-1, 2, 0, 0, 0, 0, 0, 0, 0]] * 2)
    pooled = EntityPool(DIM, sentence=False, head_word=True).attend(x, SUBJECT, OBJECT, heads)
    torch.testing.assert_close(pooled.output[0], torch.cat([x[0, 2], x[0, 6]]))
    torch.testing.assert_close(pooled.output[1], torch.cat([x[1, 5], x[1, 0]]))
    nothing = torch.tensor([[4, 4], [5, 6]])
    none = EntityPool(DIM, sentence=False, head_word=True).attend(x, nothing, OBJECT, heads)
    assert none.output[0, :DIM].eq(0).all()
    with pytest.raises(InputError, match="heads"):
        EntityPool(DIM, head_word=True)(x, SUBJECT, OBJECT)


def test_the_whole_sentence_in_four_ways() -> None:
    x = words()
    mask = torch.arange(TOKENS).expand(2, TOKENS) < torch.tensor([[TOKENS], [4]])
    for reduce, expected in (
        ("max", [x[0].amax(0), x[1, :4].amax(0)]),
        ("mean", [x[0].mean(0), x[1, :4].mean(0)]),
        ("last", [x[0, -1], x[1, 3]]),
    ):
        y = SentencePool(DIM, reduce)(x, SUBJECT, torch.tensor([[6, 7], [0, 2]]), mask=mask)
        torch.testing.assert_close(y, torch.stack(expected))
    attention = shaken(SentencePool(DIM, "attention", hidden=4))
    torch.testing.assert_close(attention(x, SUBJECT, OBJECT, mask=mask), attention.reduce(x, mask))


def test_pieces_go_by_the_order_in_the_text() -> None:
    x = words()
    three = DynamicPool(DIM)(x, SUBJECT, OBJECT).unflatten(1, (3, DIM))
    torch.testing.assert_close(three[0], torch.stack([x[0, :3].amax(0), x[0, 1:7].amax(0), x[0, 6:].amax(0)]))
    torch.testing.assert_close(three[1], torch.stack([x[1, :2].amax(0), x[1, 0:6].amax(0), x[1, 5:].amax(0)]))
    five = DynamicPool(DIM, pieces=5)(x, SUBJECT, OBJECT).unflatten(1, (5, DIM))
    pieces = [x[0, :1], x[0, 1:3], x[0, 3:6], x[0, 6:7], x[0, 7:]]
    torch.testing.assert_close(five[0], torch.stack([p.amax(0) for p in pieces]))
    assert five[1, 0].eq(0).all()
    torch.testing.assert_close(DynamicPool(DIM)(x, OBJECT, SUBJECT), DynamicPool(DIM)(x, SUBJECT, OBJECT))


def test_a_chain_gives_the_words_between_the_mentions() -> None:
    pooled = DependencyPool(DIM).attend(words(), SUBJECT, OBJECT, CHAIN)
    # the head word of a span of a chain is its first word
    assert pooled.sets[0, 2].nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert pooled.sets[1, 2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert not pooled.fallback.any()


def test_a_star_gives_the_mentions_and_its_centre() -> None:
    pooled = DependencyPool(DIM).attend(words(), SUBJECT, OBJECT, STAR)
    assert pooled.sets[0, 2].nonzero().flatten().tolist() == [1, 4, 6]
    below = DependencyPool(DIM, k=None).attend(words(), SUBJECT, OBJECT, STAR)
    assert below.sets[:, 2].all()


@pytest.mark.parametrize("heads", [CHAIN, STAR])
def test_many_steps_reach_the_whole_sentence(heads: torch.Tensor) -> None:
    x = words()
    y = DependencyPool(DIM, k=TOKENS, entities=False)(x, SUBJECT, OBJECT, heads)
    torch.testing.assert_close(y, x.amax(1))


def test_swapping_the_mentions_swaps_their_parts_alone() -> None:
    x, pool = words(), DependencyPool(DIM, k=1)
    y, swapped = (pool(x, a, b, CHAIN).unflatten(1, (3, DIM)) for a, b in ((SUBJECT, OBJECT), (OBJECT, SUBJECT)))
    torch.testing.assert_close(swapped, y[:, [1, 0, 2]])


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("reduce", ["max", "mean", "attention", "last"])
def test_padding_and_batch_mates_do_nothing(make, reduce: str) -> None:
    pool, x = shaken(make(reduce)), words()
    y = pool(x, SUBJECT, OBJECT, STAR)
    longer = torch.cat([x, torch.full((2, 3, DIM), float("nan"), dtype=x.dtype)], 1)
    heads = torch.cat([STAR, torch.full((2, 3), -2)], 1)
    mask = torch.arange(TOKENS + 3).expand(2, -1) < TOKENS
    torch.testing.assert_close(pool(longer, SUBJECT, OBJECT, heads, mask), y)
    torch.testing.assert_close(pool(x[:1], SUBJECT[:1], OBJECT[:1], STAR[:1]), y[:1])


@pytest.mark.parametrize("make", ALL)
def test_equal_words_are_their_own_mean_and_weights_lie_in_the_sets(make) -> None:
    pool = make("mean").double()
    x = words()[:, :1].expand(-1, TOKENS, -1)
    pooled = pool.attend(x, SUBJECT, OBJECT, CHAIN)
    y = pooled.output.unflatten(1, (pool.parts, DIM))
    for b in range(2):
        for part in range(pool.parts):
            expected = x[b, 0] if pooled.sets[b, part].any() else torch.zeros(DIM, dtype=x.dtype)
            torch.testing.assert_close(y[b, part], expected)
    assert pooled.weights[~pooled.sets].eq(0).all()
    torch.testing.assert_close(pooled.weights.sum(-1), pooled.sets.any(-1).double())


def test_attention_is_additive_attention_on_each_set() -> None:
    pool, x = shaken(DependencyPool(DIM, reduce="attention", hidden=4)), words()
    assert isinstance(pool.reduce, ABMIL)
    pooled = pool.attend(x, SUBJECT, OBJECT, CHAIN)
    chosen = x[0, pooled.sets[0, 2]]
    a = (torch.tanh(chosen @ pool.reduce.tanh.weight.T + pool.reduce.tanh.bias) @ pool.reduce.score.weight[0]).softmax(
        0
    )
    torch.testing.assert_close(pooled.output[0, 2 * DIM :], a @ chosen)


def test_the_gradient_of_a_maximum_flows_to_the_words_that_hold_it() -> None:
    x = words().requires_grad_()
    DependencyPool(DIM, entities=False)(x, SUBJECT, OBJECT, STAR).sum().backward()
    inside = torch.tensor([1, 4, 6])
    expected = torch.zeros(TOKENS, DIM, dtype=x.dtype)
    expected[inside[x[0, inside].argmax(0)], torch.arange(DIM)] = 1
    torch.testing.assert_close(x.grad[0], expected)


def test_a_sentence_of_one_word_with_both_mentions_on_it() -> None:
    x, span = words()[:1, :1], torch.tensor([[0, 1]])
    pooled = DependencyPool(DIM).attend(x, span, span, torch.tensor([[-1]]))
    torch.testing.assert_close(pooled.output, x[:, 0].repeat(1, 3))
    assert not pooled.fallback.any()


def test_broken_trees_fall_back_to_the_sentence_and_say_so() -> None:
    x = words()
    heads = CHAIN.clone()
    # the object of the second sentence hangs on a cycle
    heads[1, 0], heads[1, 1] = 1, 0
    pooled = DependencyPool(DIM).attend(x, SUBJECT, OBJECT, heads)
    assert pooled.fallback.tolist() == [False, True]
    torch.testing.assert_close(pooled.output[1, 2 * DIM :], x[1].amax(0))


def test_an_empty_mention_gives_zeros_and_falls_back() -> None:
    x, nothing = words(), torch.tensor([[4, 4], [5, 6]])
    pooled = DependencyPool(DIM).attend(x, nothing, OBJECT, CHAIN)
    assert pooled.output[0, :DIM].eq(0).all()
    assert pooled.fallback.tolist() == [True, False]
    assert pooled.empty.tolist() == [[True, False, False], [False] * 3]


@pytest.mark.parametrize("make", ALL)
def test_no_word_gives_zeros_and_finite_gradients(make) -> None:
    pool, x = shaken(make("attention")), words().requires_grad_()
    mask = torch.tensor([[True] * TOKENS, [False] * TOKENS])
    y = pool(x, SUBJECT, OBJECT, CHAIN, mask)
    assert y[1].eq(0).all()
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    none = torch.zeros(2, 2, dtype=torch.long)
    assert pool(x[:, :0], none, none, CHAIN[:, :0]).eq(0).all()


@pytest.mark.parametrize("make", ALL)
def test_compile_export_and_gradients(make) -> None:
    pool, x = shaken(make("attention")), words()
    y = pool(x, SUBJECT, OBJECT, CHAIN)
    # every pool compiles one and the same forward, of which torch keeps no more than eight forms
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(pool), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, SUBJECT, OBJECT, CHAIN), y)
    exported = torch.export.export(pool, (x, SUBJECT, OBJECT, CHAIN))
    torch.testing.assert_close(exported.module()(x, SUBJECT, OBJECT, CHAIN), y)
    assert torch.autograd.gradcheck(
        lambda x: pool(x, SUBJECT, OBJECT, CHAIN), (x.clone().requires_grad_(),), fast_mode=True
    )


def test_wrong_input_is_named() -> None:
    x = words()
    for call, named in (
        (lambda: DependencyPool(DIM)(x, SUBJECT, OBJECT), "heads"),
        (lambda: DependencyPool(DIM)(x, SUBJECT, OBJECT, CHAIN[:, 1:]), "heads"),
        (lambda: EntityPool(DIM)(x, SUBJECT[:1], OBJECT), "subject"),
        (lambda: EntityPool(DIM)(x, SUBJECT, OBJECT + 5), "object_"),
        (lambda: EntityPool(DIM)(x, SUBJECT, OBJECT.flip(1)), "object_"),
        (lambda: EntityPool(DIM)(x, SUBJECT.double(), OBJECT), "subject"),
        (lambda: EntityPool(DIM)(x[..., 1:], SUBJECT, OBJECT), "x: "),
        (lambda: DependencyPool(DIM, k=-1), "k: "),
        (lambda: DynamicPool(DIM, pieces=4), "pieces"),
        (lambda: EntityPool(DIM, reduce="sum"), "reduce"),
        (lambda: EntityPool(0), "dim"),
    ):
        with pytest.raises(InputError, match=named):
            call()


def test_widths_are_known_before_the_first_call() -> None:
    for make in ALL:
        pool: IndexSetPool = make("max")
        assert pool.double()(words(), SUBJECT, OBJECT, CHAIN).shape == (2, pool.out_dim)
