import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, dense_attention, features, shaken

from cenote.core import InputError, PaddedTokens
from cenote.pool import SimPool
from cenote.testing import check_pool


def test_without_query_map_it_is_the_mean_of_normalised_tokens() -> None:
    pool, x = shaken(SimPool(16, heads=4)), features()
    with torch.no_grad():
        pool.wq.weight.zero_()
    output, weights = pool.attend(x)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 9))
    torch.testing.assert_close(output, pool.norm_patches(x).mean(1))


def test_exponent_one_shifted_back_is_the_weighted_mean() -> None:
    x = features(1)
    plain, powered = shaken(SimPool(16)), shaken(SimPool(16, gamma=1.0, beta=True))
    powered.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        powered.beta.fill_(float(plain.norm_patches(x).min()) - 1e-6)
    torch.testing.assert_close(powered(x), plain(x), atol=1e-10, rtol=1e-10)


def test_permuting_tokens_permutes_weights_and_keeps_the_output() -> None:
    pool, x = shaken(SimPool(16, heads=2, gamma=2.0)), features()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    output, weights = pool.attend(x)
    permuted_output, permuted_weights = pool.attend(x[:, order])
    torch.testing.assert_close(permuted_output, output)
    torch.testing.assert_close(permuted_weights, weights[..., order])


def test_one_token_is_normalised() -> None:
    pool, x = shaken(SimPool(16, heads=2)), features(tokens=1)
    torch.testing.assert_close(pool(x), pool.norm_patches(x[:, 0]))


def test_a_large_exponent_tends_to_the_range_of_the_values() -> None:
    gamma, tokens = 400.0, 9
    pool, x = shaken(SimPool(16, gamma=gamma)), features(1, tokens)
    with torch.no_grad():
        pool.wq.weight.zero_()
    values = pool.norm_patches(x)
    expected = values.amax(1) - values.min() + 1e-6
    y = pool(x)
    # the power mean of uniform weights lies between max * N^(-1/gamma) and max
    assert (y <= expected + 1e-12).all()
    assert (y >= expected * tokens ** (-1 / gamma) - 1e-12).all()


def test_a_map_is_its_tokens_row_by_row() -> None:
    pool, image = shaken(SimPool(16, gamma=1.25)), features(2, 16, 20).unflatten(-1, (4, 5))
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    torch.testing.assert_close(pool(image), pool(image.flatten(2).transpose(1, 2)))
    torch.testing.assert_close(pool(image, mask), pool(image.flatten(2).transpose(1, 2), mask.flatten(1)))


def test_masked_padding_changes_nothing() -> None:
    for gamma in (None, 1.25):
        pool, x = shaken(SimPool(16, heads=2, gamma=gamma)), features()
        padded = torch.cat([x, torch.full((2, 3, 16), -50.0, dtype=x.dtype)], 1)
        mask = torch.arange(12).expand(2, 12) < 9
        torch.testing.assert_close(pool(padded, mask), pool(x))


def test_the_minimum_is_of_the_set_not_of_the_batch() -> None:
    pool, x = shaken(SimPool(16, gamma=2.0)), features(3)
    x[1] *= 7
    torch.testing.assert_close(pool(x)[:1], pool(x[:1]))


def test_equals_attention_written_out() -> None:
    pool, x = shaken(SimPool(16, heads=4, qkv_bias=True)), features()
    z = pool.norm_patches(x)
    q = pool.wq(x.mean(1, keepdim=True))
    expected, weights = dense_attention(q, pool.wk(z), z, 4)
    output, got = pool.attend(x)
    torch.testing.assert_close(output, expected.squeeze(1))
    torch.testing.assert_close(got, weights.squeeze(2))
    fused = F.scaled_dot_product_attention(*(t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (q, pool.wk(z), z)))
    torch.testing.assert_close(output, fused.squeeze(2).flatten(1))


def test_the_power_mean_stays_in_float32_under_autocast() -> None:
    pool, x = shaken(SimPool(16, gamma=2.0, beta=True)).float(), PaddedTokens(features().float())
    weights = torch.full((2, 9, 1), 1 / 9)
    with torch.autocast("cpu", torch.bfloat16):
        output = pool.power_mean(x, x.values, weights).output
        assert pool(x.values).dtype == torch.float32
    torch.testing.assert_close(output, pool.power_mean(x, x.values, weights).output, atol=0, rtol=0)


def test_plans_agree() -> None:
    x = features()
    absorbed, projected = (shaken(SimPool(16, heads=4, plan=plan)) for plan in ("absorbed", "projected"))
    torch.testing.assert_close(absorbed(x), projected(x), atol=1e-12, rtol=1e-12)


def test_number_of_parameters() -> None:
    for dim in (16, 48):
        assert sum(p.numel() for p in SimPool(dim, gamma=2.0, beta=True).parameters()) == 2 * dim**2 + 2 * dim + 1


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"heads": 4}, {"gamma": 1.25, "beta": True}, {"heads": 2, "gamma": 2.0}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(SimPool(16, **settings), leave_out=left_out)


@pytest.mark.parametrize(
    ("settings", "named"), [({"heads": 3}, "heads"), ({"gamma": 0.0}, "gamma"), ({"beta": True}, "beta")]
)
def test_wrong_arguments_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        SimPool(16, **settings)
