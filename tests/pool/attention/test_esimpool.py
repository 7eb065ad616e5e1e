import pytest
import torch
from tests.pools import by_rules, dense_attention, features, shaken

from cenote.core import InputError
from cenote.pool import ESimPool, SimPool
from cenote.testing import check_pool


def test_equals_attention_written_out() -> None:
    pool, x = shaken(ESimPool(24, heads=4)), features(dim=24)
    query = pool.norm_patches(x.mean(1, keepdim=True))
    expected, dense = dense_attention(query, pool.norm_patches(x), x, 4)
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected.squeeze(1))
    torch.testing.assert_close(weights, dense.squeeze(2))


def test_default_heads_are_the_papers_or_the_largest_divisor_below() -> None:
    assert ESimPool(768).heads == 12
    assert ESimPool(50).heads == 10
    assert ESimPool(13).heads == 1


def test_with_power_mean_it_is_simpool_on_raw_values_and_identity_maps() -> None:
    x = features(dim=24)
    pool, simpool = shaken(ESimPool(24, heads=1, gamma=2.0)), SimPool(24, gamma=2.0).double()
    with torch.no_grad():
        simpool.wk.weight.copy_(torch.eye(24))
        simpool.wq.weight.copy_(torch.eye(24))
    # a norm of zero mean and unit variance does nothing to tokens that have them already
    z = torch.nn.functional.layer_norm(x, (24,), eps=0.0)
    for norm in (pool.norm_patches, simpool.norm_patches):
        torch.nn.init.ones_(norm.weight)
        torch.nn.init.zeros_(norm.bias)
        norm.eps = 0.0
    # SimPool asks with the raw mean, ESimPool with the normalised one: scale the map that makes them equal per set
    for i in range(2):
        mean = z[i].mean(0)
        centred = torch.nn.functional.layer_norm(mean, (24,), eps=0.0)
        with torch.no_grad():
            simpool.wq.weight.copy_(torch.outer(centred, mean) / mean.dot(mean))
        torch.testing.assert_close(pool(z[i : i + 1]), simpool(z[i : i + 1]))


def test_scale_sharpens() -> None:
    x = features(dim=24)
    weights = [shaken(ESimPool(24, heads=2, scale=s)).attend(x).weights for s in (0.0, 1.0, 20.0)]
    torch.testing.assert_close(weights[0], torch.full_like(weights[0], 1 / 9))
    assert (weights[2].amax(-1) > weights[1].amax(-1)).all()


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"heads": 1}, {"heads": 4, "gamma": 1.25, "beta": True}, {"plan": "projected"}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(ESimPool(16, **settings), leave_out=left_out)


@pytest.mark.parametrize(
    ("settings", "named"), [({"heads": 5}, "heads"), ({"gamma": -1.0}, "gamma"), ({"beta": True}, "beta")]
)
def test_wrong_arguments_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        ESimPool(16, **settings)
