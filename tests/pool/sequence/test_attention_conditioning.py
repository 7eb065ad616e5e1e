from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, features, shaken
from torch import Tensor

from cenote import Bags
from cenote.core import InputError
from cenote.core.sets import Tokens
from cenote.pool import (
    AttentionalAffine,
    AttentionalConcat,
    AttentionalGate,
    BaselineAttention,
    Lexicon,
    Pool,
    Pooled,
)
from cenote.testing import check_pool

DIM, F_ = 6, 3
ALL = [
    lambda: AttentionalConcat(DIM, F_),
    lambda: AttentionalConcat(DIM, F_, tanh=True),
    lambda: AttentionalGate(DIM, F_),
    lambda: AttentionalAffine(DIM, F_),
    lambda: AttentionalAffine(DIM, F_, tanh=True),
]


class Joined(Pool):
    """A conditioned pool with its features joined to the tokens, so that the contract of set pools can be checked."""

    def __init__(self, inner) -> None:
        super().__init__(inner.dim + inner.features, inner.dim)
        self.inner = inner
        self.inert_parameters = tuple(f"inner.{name}" for name in inner.inert_parameters)

    def pool(self, tokens: Tokens) -> Pooled:
        h, c = tokens.values.split([self.inner.dim, self.inner.features], -1)
        weights = tokens.softmax(self.inner.score(self.inner.condition(h, c)))
        return Pooled(self.inner(tokens.replace(h), c), weights)


def inputs(tokens: int = 9) -> tuple[Tensor, Tensor]:
    return features(dim=DIM, tokens=tokens), features(dim=F_, tokens=tokens, seed=2)


def plain(h: Tensor, v: Tensor) -> Tensor:
    return ((h @ v).softmax(-1).unsqueeze(-1) * h).sum(1)


def test_equations() -> None:
    h, c = inputs()
    concat, mapped, gate, affine, tanh = (shaken(make()) for make in ALL)
    both = torch.cat([h, c], -1)
    scored = {
        concat: both,
        mapped: torch.tanh(both @ mapped.map.weight.T + mapped.map.bias),
        gate: h / (1 + (-(c @ gate.gate.weight.T + gate.gate.bias)).exp()),
        affine: (c @ affine.scale.weight.T + affine.scale.bias) * h + c @ affine.shift.weight.T + affine.shift.bias,
        tanh: torch.tanh((c @ tanh.scale.weight.T + tanh.scale.bias) * h + c @ tanh.shift.weight.T + tanh.shift.bias),
    }
    for pool, f in scored.items():
        a = (f @ pool.score.weight[0] + pool.score.bias).softmax(-1)
        output, weights = pool.attend(h, c)
        torch.testing.assert_close(output, (a.unsqueeze(-1) * h).sum(1))
        torch.testing.assert_close(weights, a.unsqueeze(1))


def test_the_baseline_scores_with_one_layer_or_two() -> None:
    h, _ = inputs()
    one, two = shaken(BaselineAttention(DIM)), shaken(BaselineAttention(DIM, layers=2, dropout=0.5))
    torch.testing.assert_close(one(h), plain(h, one.score.weight[0]))
    hidden = torch.tanh(h @ two.hidden[0].weight.T + two.hidden[0].bias)
    a = (hidden @ two.score.weight[0]).softmax(-1)
    torch.testing.assert_close(two(h), (a.unsqueeze(-1) * h).sum(1))
    two.train()
    assert not torch.equal(two(h), two(h))
    concat = shaken(AttentionalConcat(DIM, F_))
    with torch.no_grad():
        one.score.weight.copy_(concat.score.weight[:, :DIM])
    torch.testing.assert_close(concat(h, torch.zeros(2, 9, F_)), one(h))
    check_pool(BaselineAttention(DIM, layers=2))
    for settings, named in (({"layers": 3}, "layers"), ({"dropout": 1.5}, "dropout")):
        with pytest.raises(InputError, match=named):
            BaselineAttention(DIM, **settings)


def test_concat_without_knowledge_is_plain_attention() -> None:
    pool, (h, _) = shaken(AttentionalConcat(DIM, F_)), inputs()
    torch.testing.assert_close(pool(h, torch.zeros(2, 9, F_)), plain(h, pool.score.weight[0, :DIM]))


def test_without_knowledge_gate_and_affine_are_constant_maps_and_not_plain_attention() -> None:
    h, _ = inputs()
    nothing = torch.zeros(2, 9, F_, dtype=torch.float64)
    gate, affine = shaken(AttentionalGate(DIM, F_)), shaken(AttentionalAffine(DIM, F_))
    v = gate.score.weight[0]
    torch.testing.assert_close(gate(h, nothing), plain(h, v * torch.sigmoid(gate.gate.bias)))
    assert not torch.allclose(gate(h, nothing), plain(h, v))
    torch.testing.assert_close(affine(h, nothing), plain(h, affine.score.weight[0] * affine.scale.bias))


@pytest.mark.parametrize("make", ALL)
def test_a_sentence_without_words_gives_zeros(make) -> None:
    pool, (h, c) = shaken(make()), inputs()
    mask = torch.tensor([[True] * 9, [False] * 9])
    output, weights = pool.attend(h, c, mask)
    assert output[1].eq(0).all()
    assert weights[1].eq(0).all()
    torch.testing.assert_close(output[0], pool(h, c)[0])


def test_a_gate_of_zeros_halves_the_scores() -> None:
    pool, (h, c) = shaken(AttentionalGate(DIM, F_)), inputs()
    with torch.no_grad():
        pool.gate.weight.zero_()
        pool.gate.bias.zero_()
    torch.testing.assert_close(pool(h, c), plain(h, pool.score.weight[0] / 2))


def test_an_affine_map_of_one_and_nothing_is_plain_attention() -> None:
    pool, (h, c) = shaken(AttentionalAffine(DIM, F_)), inputs()
    with torch.no_grad():
        for map_ in (pool.scale, pool.shift):
            map_.weight.zero_()
            map_.bias.zero_()
        pool.scale.bias.fill_(1)
    torch.testing.assert_close(pool(h, c), plain(h, pool.score.weight[0]))


@pytest.mark.parametrize("make", ALL)
def test_weights_sum_to_one_and_the_output_lies_among_the_tokens(make) -> None:
    pool, (h, c) = shaken(make()), inputs()
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [4]])
    output, weights = pool.attend(h, c, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, dtype=torch.float64))
    assert (weights[1, 0, 4:] == 0).all()
    assert (output[1] <= h[1, :4].amax(0)).all()
    assert (output[1] >= h[1, :4].amin(0)).all()


@pytest.mark.parametrize("make", ALL)
def test_padding_changes_nothing_and_ragged_equals_padded(make) -> None:
    pool, (h, c) = shaken(make()), inputs()
    longer = [F.pad(t, (0, 0, 0, 3), value=float("nan")) for t in (h, c)]
    mask = torch.arange(12).expand(2, 12) < 9
    torch.testing.assert_close(pool(*longer, mask), pool(h, c))
    torch.testing.assert_close(pool(Bags.from_padded(h), c.flatten(0, 1)), pool(h, c))


def test_one_sentence_of_one_word_keeps_its_shape() -> None:
    h, c = inputs(1)
    output, weights = shaken(AttentionalGate(DIM, F_)).attend(h[:1], c[:1])
    torch.testing.assert_close(output, h[:1, 0])
    assert weights.shape == (1, 1, 1)


@by_rules(check_pool)
@pytest.mark.parametrize("make", ALL)
def test_contract(make, left_out: tuple[str, ...]) -> None:
    check_pool(Joined(make()), leave_out=left_out)


def test_features_that_do_not_fit_are_named() -> None:
    h, c = inputs()
    pool = AttentionalGate(DIM, F_).double()
    with pytest.raises(InputError, match="features: expected shape"):
        pool(h, c[:, :8])
    with pytest.raises(InputError, match="features: expected shape"):
        pool(h, c[..., :2])
    with pytest.raises(InputError, match="features"):
        AttentionalGate(DIM, 0)


def test_lexicon_looks_up_batches_and_cases() -> None:
    lexicon = Lexicon({"a": {"good": [1, 2], "Us": [3, 4]}, "b": {"bad": [5]}})
    assert lexicon.features == 3
    assert lexicon.names == ["a:0", "a:1", "b"]
    assert "GOOD" in lexicon
    assert "us" not in lexicon
    found, mask = lexicon.lookup_batch([["Us", "bad", "x"], [], ["Good"]])
    assert found.tolist() == [
        [[3, 4, 0], [0, 0, 5], [0, 0, 0]],
        [[0, 0, 0]] * 3,
        [[1, 2, 0], [0, 0, 0], [0, 0, 0]],
    ]
    assert mask.sum(1).tolist() == [3, 0, 1]
    assert Lexicon({"a": {"good": [1]}}, lower=False).lookup(["Good"]).tolist() == [[0]]
    assert lexicon.lookup([]).shape == (0, 3)


@pytest.mark.parametrize("wrong", [{}, {"a": {}}, {"a": {"x": []}}, {"a": {"x": [1], "y": [1, 2]}}])
def test_lexicons_without_a_width_are_named(wrong: dict) -> None:
    with pytest.raises(InputError, match="lexicons"):
        Lexicon(wrong)
