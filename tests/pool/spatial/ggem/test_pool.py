import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pools import by_rules, features

from cenote.core import Bags, InputError
from cenote.pool import GeM, GGeM
from cenote.pool.spatial.ggem.dependence import group_dependence, recall_at_one
from cenote.testing import check_pool


def positive(batch: int = 2, tokens: int = 9, dim: int = 12) -> torch.Tensor:
    return features(batch, tokens, dim).abs() + 0.01


def with_exponents(*p: float, dim: int = 12, **options) -> GGeM:
    pool = GGeM(dim, groups=len(p), **options).double()
    with torch.no_grad():
        pool.p.copy_(torch.tensor(p))
    return pool


def test_exponent_one_is_the_mean() -> None:
    x = positive()
    torch.testing.assert_close(GGeM(12, groups=4, p=1.0).double()(x), x.mean(1))


@pytest.mark.parametrize("p", [5.0, 50.0, 2000.0])
def test_a_large_exponent_tends_to_the_maximum_from_below(p: float) -> None:
    x, tokens = positive(), 9
    top, y = x.amax(1), GeM(12, p=p).double()(x)
    assert (y <= top * (1 + 1e-12)).all()
    assert (top - y <= top * (1 - tokens ** (-1 / p)) + 1e-12).all()


def test_a_large_negative_exponent_tends_to_the_minimum() -> None:
    x = positive()
    torch.testing.assert_close(GeM(12, p=-4000.0).double()(x), x.amin(1), atol=0, rtol=1e-3)


def test_one_group_is_gem_and_gem_is_lp_pooling_over_the_root_of_the_count() -> None:
    x = positive()
    y = GGeM(12, groups=1, p=3.0).double()(x)
    torch.testing.assert_close(y, GeM(12, p=3.0).double()(x))
    torch.testing.assert_close(y, F.lp_pool1d(x.transpose(1, 2), 3.0, 9).squeeze(-1) / 9 ** (1 / 3))


def test_log_domain_equals_the_direct_form_group_by_group() -> None:
    x, p = positive(), torch.tensor([0.5, 1.0, 3.0, -2.0], dtype=torch.float64)
    by_channel = p.repeat_interleave(3)
    direct = x.pow(by_channel).mean(1).pow(1 / by_channel)
    torch.testing.assert_close(with_exponents(*p)(x), direct)


def test_groups_are_contiguous_channels() -> None:
    x = positive()
    pool = with_exponents(1.0, 1.0, 7.0)
    y = pool(x)
    torch.testing.assert_close(y[:, :8], x.mean(1)[:, :8])
    torch.testing.assert_close(y[:, 8:], GeM(4, p=7.0).double()(x[..., 8:]))


@settings(deadline=None, derandomize=True)
@given(st.floats(0.01, 100.0), st.floats(-5.0, 20.0))
def test_scaling_the_tokens_scales_the_result(factor: float, p: float) -> None:
    # all stay above eps
    x = positive() + 0.1
    pool = GeM(12, p=p).double()
    torch.testing.assert_close(pool(factor * x), factor * pool(x), atol=1e-10, rtol=1e-7)


@settings(deadline=None, derandomize=True)
@given(st.floats(-20.0, 20.0), st.floats(0.01, 10.0))
def test_rises_with_the_exponent(p: float, step: float) -> None:
    x = positive()
    lower, higher = GeM(12, p=p).double()(x), GeM(12, p=p + step).double()(x)
    assert (higher >= lower - 1e-7).all()
    if step > 0.5:
        assert (higher > lower).all()


def test_exponents_near_zero_pass_smoothly_through_the_geometric_mean() -> None:
    x = positive()
    geometric = x.log().mean(1).exp()
    for p in (-2e-4, -1e-5, 0.0, 1e-5, 2e-4):
        torch.testing.assert_close(GeM(12, p=p).double()(x), geometric, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("p", [-3.0, 0.0, 1.0, 30.0])
def test_equal_tokens_give_that_token(p: float) -> None:
    token = positive(1, 1)
    torch.testing.assert_close(GeM(12, p=p).double()(token.expand(1, 7, 12)), token[:, 0])


def test_order_of_tokens_does_not_matter() -> None:
    x, pool = positive(), with_exponents(0.5, 3.0)
    torch.testing.assert_close(pool(x.flip(1)), pool(x))


def test_gradients_are_those_of_the_closed_form() -> None:
    x = positive().requires_grad_()
    pool = with_exponents(2.5)
    y = pool(x)
    (by_x,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(by_x, (x / y.unsqueeze(1)).pow(1.5) / 9)
    (by_p,) = torch.autograd.grad(y.sum(), pool.p)
    share = x.pow(2.5) / x.pow(2.5).sum(1, keepdim=True)
    expected = y / 2.5 * ((share * x.log()).sum(1) - y.log())
    torch.testing.assert_close(by_p, expected.sum().unsqueeze(0))


@pytest.mark.parametrize("negatives", ["clamp", "shift", "abs_sign"])
def test_gradcheck_for_tokens_and_exponents(negatives: str) -> None:
    pool, x = with_exponents(0.7, 3.0, negatives=negatives), features(2, 5, 12).requires_grad_()

    def run(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(pool, {"p": p}, (x,))

    assert torch.autograd.gradcheck(run, (x, pool.p.detach().clone().requires_grad_()))


def test_weights_are_the_shares_of_the_powers_averaged_over_each_group() -> None:
    x, pool = positive(), with_exponents(1.0, 4.0)
    by_channel = torch.tensor([1.0] * 6 + [4.0] * 6, dtype=torch.float64)
    share = x.pow(by_channel) / x.pow(by_channel).sum(1, keepdim=True)
    expected = share.unflatten(-1, (2, 6)).mean(-1).transpose(1, 2)
    output, weights = pool.attend(x)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(output, pool(x))


def test_weights_of_single_channels_sum_to_one_over_real_tokens() -> None:
    x, pool = positive(), with_exponents(1.0, 4.0)
    by_channel = torch.tensor([1.0] * 6 + [4.0] * 6, dtype=torch.float64)
    weights = pool.channel_weights(x)
    torch.testing.assert_close(weights, x.pow(by_channel) / x.pow(by_channel).sum(1, keepdim=True))
    torch.testing.assert_close(weights.unflatten(-1, (2, 6)).mean(-1).transpose(1, 2), pool.attend(x).weights)
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [4]])
    masked = pool.channel_weights(x, mask)
    assert masked[~mask].eq(0).all()
    torch.testing.assert_close(masked.sum(1), torch.ones(2, 12, dtype=torch.float64))


def test_dependence_between_groups_is_linear_cka() -> None:
    y = features(1, 40, 6)[0]
    found = group_dependence(y, 3)
    grams = [(c - c.mean(0)) @ (c - c.mean(0)).T for c in y.split(2, 1)]
    for i, a in enumerate(grams):
        for j, b in enumerate(grams):
            torch.testing.assert_close(found[i, j], (a * b).sum() / (a.norm() * b.norm()))
    turned = torch.cat([y[:, :2], 3 * y[:, :2] @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double() + 1], 1)
    torch.testing.assert_close(group_dependence(turned, 2), torch.ones(2, 2, dtype=torch.float64))
    still = group_dependence(torch.cat([y[:, :2], torch.ones(40, 2)], 1), 2)
    torch.testing.assert_close(still, torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    with pytest.raises(InputError, match="groups"):
        group_dependence(y, 4)


def test_recall_at_one_asks_the_other_items() -> None:
    x = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.7]]), dim=1)
    assert recall_at_one(x, torch.tensor([0, 0, 1, 0])) == 0.5
    with pytest.raises(InputError, match="descriptors"):
        recall_at_one(x[:1], torch.tensor([0]))


def test_negative_features() -> None:
    x = features(dim=12)
    p = 3.0
    clamped = x.clamp(min=1e-6).pow(p).mean(1).pow(1 / p)
    torch.testing.assert_close(GeM(12, p).double()(x), clamped)
    shifted = (x - x.amin(1, keepdim=True)).clamp(min=1e-6).pow(p).mean(1).pow(1 / p)
    torch.testing.assert_close(GeM(12, p, negatives="shift").double()(x), shifted)
    signed = x.abs().pow(p).mean(1).pow(1 / p) * x.mean(1).sign()
    torch.testing.assert_close(GeM(12, p, negatives="abs_sign").double()(x), signed)


def test_large_powers_do_not_overflow_in_float32() -> None:
    x = torch.full((1, 4, 2), 10.0)
    torch.testing.assert_close(GeM(2, p=200.0)(x), x[:, 0], rtol=1e-5, atol=1e-5)


def test_a_map_and_bags_are_the_same_tokens() -> None:
    pool, image = with_exponents(0.5, 3.0), positive(2, 12, 20).unflatten(-1, (4, 5))
    x = image.flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool(image), pool(x))
    torch.testing.assert_close(pool(Bags.from_padded(x)), pool(x))


def test_power_mean_aggregation_of_torch_geometric_agrees() -> None:
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    # theirs clamps tokens and mean powers to at most 100
    x, p = positive().clamp(max=1.5), torch.tensor([0.5, 1.0, 3.0, 8.0])
    theirs = aggr.PowerMeanAggregation(learn=True, channels=12).double()
    with torch.no_grad():
        theirs.p.copy_(p.repeat_interleave(3).view_as(theirs.p))
    index = torch.arange(2).repeat_interleave(9)
    torch.testing.assert_close(with_exponents(*p.tolist())(x), theirs(x.flatten(0, 1), index))


def test_fixed_exponent_has_nothing_to_train() -> None:
    assert not any(p.requires_grad for p in GGeM(12, learnable=False).parameters())


def test_default_groups_are_the_heads_of_a_vit_or_the_largest_divisor_below() -> None:
    assert [GGeM(d).groups for d in (768, 50, 13)] == [12, 10, 1]


@by_rules(check_pool)
@pytest.mark.parametrize("options", [{"groups": 2, "negatives": "shift"}, {"p": 0.7, "negatives": "abs_sign"}])
def test_contract_of_variants(options: dict, left_out: tuple[str, ...]) -> None:
    check_pool(GGeM(16, **options), leave_out=left_out)


@pytest.mark.parametrize(("options", "named"), [({"groups": 5}, "groups"), ({"negatives": "drop"}, "negatives")])
def test_wrong_arguments_are_named(options: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        GGeM(12, **options)
