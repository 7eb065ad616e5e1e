from __future__ import annotations

import pytest
import torch
from tests.pools import by_rules, features, shaken
from torch import Tensor

from cenote.core import InputError
from cenote.core.sets import PaddedTokens
from cenote.pool import (
    IMLPAttention,
    InteractiveAttention,
    InteractiveEncoder,
    LinAttention,
    MLPAttention,
    PaddedPool,
    PiecewiseMaxPool,
    Pooled,
    YangAttention,
    ZhouAttention,
    attention_penalty,
    combined_keys,
    mass_by_type,
    mass_difference,
)
from cenote.testing import check_pool

KEYS = torch.tensor([[0, 3], [5, 2]])
MASK = torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]])


class EndsAsKeys(PaddedPool):
    """Keyed attention with the first and last real token as its keys, so that the contract can be checked."""

    permutation_invariant = False

    def __init__(self, inner: MLPAttention) -> None:
        super().__init__(inner.dim, inner.out_dim)
        self.inner = inner
        self.inert_parameters = tuple(f"inner.{name}" for name in inner.inert_parameters)

    def pool_padded(self, tokens: PaddedTokens) -> Pooled:
        x = tokens.values
        real = torch.ones(x.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask
        slots = torch.arange(x.shape[1])
        last = torch.where(real, slots, -1)
        first = torch.where(real, slots, x.shape[1])
        if x.shape[1] == 0:
            return Pooled(x.new_zeros(x.shape[0], self.out_dim), None)
        ends = torch.stack([first.amin(1), last.amax(1)], 1)
        ends = ends.masked_fill(~real.any(1, keepdim=True), -1)
        output, weights = self.inner.attend(x, ends, tokens.mask)
        return Pooled(output, weights.transpose(1, 2))


def test_equations_of_self_attention() -> None:
    x = features()
    zhou, yang = shaken(ZhouAttention(16)), shaken(YangAttention(16, hidden=5))
    a = (torch.tanh(x) @ zhou.u[0]).softmax(-1)
    torch.testing.assert_close(zhou(x), torch.tanh((a.unsqueeze(-1) * x).sum(1)))
    a = (torch.tanh(x @ yang.map.weight.T + yang.map.bias) @ yang.u[0]).softmax(-1)
    torch.testing.assert_close(yang(x), (a.unsqueeze(-1) * x).sum(1))


def test_several_rows_of_weights() -> None:
    pool, x = shaken(LinAttention(16, rows=3, hidden=5)), features()
    output, weights = pool.attend(x, MASK)
    for b, n in enumerate((9, 6)):
        a = (torch.tanh(x[b, :n] @ pool.map.weight.T) @ pool.score.weight.T).softmax(0)
        torch.testing.assert_close(output[b], a.T @ x[b, :n])
        torch.testing.assert_close(weights[b, :, :n], a.T)
    expected = sum((w @ w.T - torch.eye(3)).square().sum() for w in weights) / 2
    torch.testing.assert_close(attention_penalty(weights), expected)
    assert attention_penalty(torch.full((1, 3, 4), 0.25)).item() == pytest.approx(3 * 0.75**2 + 6 * 0.25**2)
    check_pool(LinAttention(16, rows=1, hidden=4))
    with pytest.raises(InputError, match="rows"):
        LinAttention(16, rows=0)


def test_rows_joined_by_a_layer() -> None:
    pool, x = shaken(LinAttention(16, rows=3, hidden=5, joined=7)), features()
    assert pool.out_dim == 7
    rows = LinAttention(16, rows=3, hidden=5).double()
    rows.load_state_dict({k: v for k, v in pool.state_dict().items() if not k.startswith("joined")})
    output, weights = pool.attend(x, MASK)
    flat = rows(x, MASK).flatten(1)
    torch.testing.assert_close(output, torch.relu(flat @ pool.joined.weight.T + pool.joined.bias))
    assert weights.shape == (2, 3, 9)
    check_pool(LinAttention(8, rows=2, hidden=4, joined=5))


def test_a_vector_of_zeros_gives_the_mean() -> None:
    x = features()
    zhou, yang = shaken(ZhouAttention(16)), shaken(YangAttention(16))
    with torch.no_grad():
        zhou.u.zero_()
        yang.u.zero_()
    torch.testing.assert_close(zhou(x), torch.tanh(x.mean(1)))
    torch.testing.assert_close(yang(x), x.mean(1))


def test_equation_of_feature_attention() -> None:
    pool, x = shaken(MLPAttention(16)), features()
    output, weights = pool.attend(x, KEYS, MASK)
    for b in range(2):
        n = int(MASK[b].sum())
        for k in range(2):
            joined = torch.cat([x[b, :n], x[b, KEYS[b, k]].expand(n, -1)], -1)
            hidden = torch.tanh(joined @ pool.map.weight.T + pool.map.bias)
            a = (hidden @ pool.score.weight[0] + pool.score.bias).softmax(0)
            torch.testing.assert_close(output[b, 16 * k : 16 * (k + 1)], a @ x[b, :n])
            torch.testing.assert_close(weights[b, k, :n], a)
    assert weights[1, :, 6:].eq(0).all()


def test_without_the_key_in_the_scores_all_keys_look_alike() -> None:
    pool, x = shaken(MLPAttention(16)), features()
    with torch.no_grad():
        pool.map.weight[:, 16:] = 0
    _, weights = pool.attend(x, KEYS)
    torch.testing.assert_close(weights[:, 0], weights[:, 1])


def test_averaging_one_key_is_that_key() -> None:
    one, many, x = shaken(MLPAttention(16, keys=1)), shaken(IMLPAttention(16)), features()
    many.load_state_dict(one.state_dict())
    key = KEYS[:, :1]
    padded = torch.cat([key, torch.full((2, 3), -1)], 1)
    for keys in (key, padded, key.expand(-1, 3)):
        torch.testing.assert_close(many(x, keys), one(x, key))
        torch.testing.assert_close(many.attend(x, keys).weights, one.attend(x, key).weights)


def test_lists_of_keys_are_combined_with_what_is_none_last() -> None:
    pool, x = shaken(IMLPAttention(16)), features()
    frames = torch.tensor([[4, -1], [-1, -1]])
    both = combined_keys(KEYS, frames)
    assert both.tolist() == [[4, 3, 0, -1], [5, 2, -1, -1]]
    torch.testing.assert_close(pool(x, both), pool(x, torch.cat([frames, KEYS], 1)))
    torch.testing.assert_close(pool(x, both)[1:], pool(x, KEYS)[1:])
    with pytest.raises(InputError, match="keys: expected at least one"):
        combined_keys()


def test_averaging_is_over_the_real_keys() -> None:
    pool, x = shaken(IMLPAttention(16)), features()
    keys = torch.tensor([[4, 1, -1], [2, -1, -1]])
    single = [pool(x, keys[:, k : k + 1]) for k in range(2)]
    output, weights = pool.attend(x, keys)
    torch.testing.assert_close(output[0], (single[0][0] + single[1][0]) / 2)
    torch.testing.assert_close(output[1], single[0][1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, dtype=torch.float64))


def test_no_key_gives_zeros_and_finite_gradients() -> None:
    pool, x = shaken(IMLPAttention(16)), features().requires_grad_()
    y = pool(x, torch.full((2, 3), -1))
    assert y.eq(0).all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert pool(x[:, :, :], torch.zeros(2, 0, dtype=torch.long)).eq(0).all()


def test_a_key_at_a_padded_slot_is_no_key() -> None:
    pool, x = shaken(IMLPAttention(16)), features()
    torch.testing.assert_close(
        pool(x, torch.tensor([[3, -1], [2, 8]]), MASK), pool(x, torch.tensor([[3, -1], [2, -1]]), MASK)
    )


@by_rules(check_pool)
@pytest.mark.parametrize("pool", [MLPAttention(8), IMLPAttention(8)])
def test_contract_of_feature_attention(pool: MLPAttention, left_out: tuple[str, ...]) -> None:
    check_pool(EndsAsKeys(pool), leave_out=left_out)


def test_interactive_attention_equation() -> None:
    pool = shaken(InteractiveAttention(16, tokens=9, aspects=3))
    h, s = features(), features(tokens=3, seed=5)
    aspects = torch.tensor([[True] * 3, [True, True, False]])
    y, of_context, of_aspects = pool.attend(h, s, MASK, aspects)
    b, n, m = 1, 6, 2
    beta = torch.tanh(h[b, :n] @ (pool.of_context @ s[b, :m].mean(0)) + pool.context_bias[:n]).softmax(0)
    gamma = torch.tanh(s[b, :m] @ (pool.of_aspects @ h[b, :n].mean(0)) + pool.aspect_bias[:m]).softmax(0)
    torch.testing.assert_close(y[b], torch.cat([beta @ h[b, :n], gamma @ s[b, :m]]))
    torch.testing.assert_close(of_context[b, 0, :n], beta)
    torch.testing.assert_close(of_aspects[b, 0, :m], gamma)
    assert of_context[b, 0, n:].eq(0).all()
    with pytest.raises(InputError, match="context: this pool has 9 biases, got 8"):
        pool(h[:, :8], s)


@pytest.mark.parametrize("average", ["padded", "last"])
def test_what_stands_for_the_other_side(average: str) -> None:
    pool = shaken(InteractiveAttention(16, average=average))
    h, s = features(), features(tokens=3, seed=5)
    aspects = torch.tensor([[True] * 3, [True, True, False]])
    y, of_context, _ = pool.attend(h, s, MASK, aspects)
    of_h, of_s = (h[1, :6].sum(0) / 9, s[1, :2].sum(0) / 3) if average == "padded" else (h[1, 5], s[1, 1])
    beta = torch.tanh(h[1, :6] @ (pool.of_context @ of_s)).softmax(0)
    gamma = torch.tanh(s[1, :2] @ (pool.of_aspects @ of_h)).softmax(0)
    torch.testing.assert_close(y[1], torch.cat([beta @ h[1, :6], gamma @ s[1, :2]]))
    torch.testing.assert_close(of_context[1, 0, :6], beta)
    with pytest.raises(InputError, match="average"):
        InteractiveAttention(16, average="first")


def test_the_whole_of_ian_reads_both_sides_by_itself() -> None:
    model = shaken(InteractiveEncoder(16, hidden=5, tokens=9, aspects=3))
    x, terms = features(), features(tokens=3, seed=5)
    aspects = torch.tensor([[True] * 3, [True, True, False]])
    nan = float("nan")
    y = model(x.masked_fill(~MASK.unsqueeze(-1), nan), terms.masked_fill(~aspects.unsqueeze(-1), nan), MASK, aspects)
    h, s = model.context(x[1:, :6])[0], model.aspects(terms[1:, :2])[0]
    pad = torch.nn.functional.pad
    expected = model.attention(pad(h, (0, 0, 0, 3)), pad(s, (0, 0, 0, 1)), MASK[1:], aspects[1:])
    torch.testing.assert_close(y[1:], expected)
    assert y.shape == (2, model.out_dim)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_interactive_attention_ignores_padding() -> None:
    pool, h, s = shaken(InteractiveAttention(16)), features(), features(tokens=3, seed=5)
    nan = torch.full((2, 2, 16), float("nan"), dtype=h.dtype)
    longer = pool(
        torch.cat([h, nan], 1),
        torch.cat([s, nan], 1),
        torch.arange(11).expand(2, 11) < 9,
        torch.arange(5).expand(2, 5) < 3,
    )
    torch.testing.assert_close(longer, pool(h, s))


def test_piecewise_maximum() -> None:
    x = features(1, 7, 4)
    y = PiecewiseMaxPool(4)(x, torch.tensor([[4, 1]]))
    pieces = [x[0, :2].amax(0), x[0, 2:5].amax(0), x[0, 5:].amax(0)]
    torch.testing.assert_close(y[0], torch.tanh(torch.cat(pieces)))


def test_empty_pieces_are_zero() -> None:
    x = features(1, 5, 4) - 10
    pool = PiecewiseMaxPool(4)
    middle = pool(x, torch.tensor([[0, 0]])).view(3, 4)[1]
    after = pool(x, torch.tensor([[1, 4]])).view(3, 4)[2]
    assert middle.eq(0).all()
    assert after.eq(0).all()
    masked = pool(x, torch.tensor([[0, 1]]), torch.tensor([[True, True, False, False, False]])).view(3, 4)
    assert masked[2].eq(0).all()


def test_entities_that_open_their_pieces_leave_the_first_one_empty_at_the_start() -> None:
    x, pool = features(1, 7, 4), PiecewiseMaxPool(4, tanh=False, entities="open")
    y = pool(x, torch.tensor([[4, 1]])).view(3, 4)
    torch.testing.assert_close(y, torch.stack([x[0, 0], x[0, 1:4].amax(0), x[0, 4:].amax(0)]))
    both = pool(x - 10, torch.tensor([[0, 0]])).view(3, 4)
    assert both[:2].eq(0).all()
    torch.testing.assert_close(both[2], (x - 10)[0].amax(0))
    with pytest.raises(InputError, match="entities"):
        PiecewiseMaxPool(4, entities="between")


def test_mass_of_two_kinds_of_contexts_is_compared() -> None:
    from scipy.stats import mannwhitneyu

    torch.manual_seed(0)
    first, second = torch.rand(30, 2), torch.rand(20, 2)
    first[:, 0] += 0.5
    more, same = mass_difference(first, second)
    assert more.difference == pytest.approx(float(first[:, 0].mean() - second[:, 0].mean()))
    assert more.p == pytest.approx(mannwhitneyu(first[:, 0].numpy(), second[:, 0].numpy()).pvalue)
    assert more.p < 1e-3
    assert same.p > 0.01
    with pytest.raises(InputError, match="first, second"):
        mass_difference(first, second[:0])
    with pytest.raises(InputError, match="first, second"):
        mass_difference(first, second[:, :1])


def test_mass_by_type() -> None:
    pool, x = shaken(YangAttention(16)), features()
    _, weights = pool.attend(x, MASK)
    types = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0, 0], [2, 2, 2, 2, 2, 1, 0, 0, 0]])
    mass = mass_by_type(weights, types, 4, MASK)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 1, dtype=torch.float64))
    torch.testing.assert_close(mass[1, 0, 1], weights[1, 0, 5])
    assert mass[1, 0, 0] == 0
    assert mass[:, :, 3].eq(0).all()
    with pytest.raises(InputError, match="types: expected numbers from 0 to 1"):
        mass_by_type(weights, types, 2)
    with pytest.raises(InputError, match="types: expected shape"):
        mass_by_type(weights, types[:, 1:], 4)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (torch.tensor([[0, 9], [1, 1]]), "positions from -1 to 8"),
        (torch.tensor([[0, -2], [1, 1]]), "positions from -1 to 8"),
        (torch.tensor([[0, 1, 2], [1, 1, 2]]), "built for 2 keys, got 3"),
        (torch.tensor([0, 1]), "shape"),
        (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "integer"),
    ],
)
def test_wrong_keys_are_named(keys: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=f"keys: .*{said}"):
        MLPAttention(16).double()(features(), keys)


def test_wrong_entities_are_named() -> None:
    with pytest.raises(InputError, match="entities: expected positions from 0 to 8"):
        PiecewiseMaxPool(16)(features(), torch.tensor([[0, -1], [1, 1]]))
