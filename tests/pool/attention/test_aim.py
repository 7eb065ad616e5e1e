import pytest
import torch
from tests.pools import by_rules, dense_attention, features, shaken
from torch import nn

from cenote.core import Bags, InputError
from cenote.pool import AimPool
from cenote.testing import check_pool


def written_out(pool: AimPool, x: torch.Tensor) -> torch.Tensor:
    bn = nn.BatchNorm1d(pool.dim, eps=1e-6, affine=False).double().train(pool.training)
    bn.load_state_dict(pool.bn.state_dict())
    z = bn(x.transpose(1, 2)).transpose(1, 2)
    query = pool.cls_token.expand(len(x), -1, -1)
    return dense_attention(query, pool.k(z), pool.v(z), pool.heads)[0].mean(1)


@pytest.mark.parametrize("settings", [{}, {"heads": 2, "queries": 3, "qkv_bias": True}])
@pytest.mark.parametrize("training", [False, True])
def test_equals_attention_on_batch_normalised_tokens(settings: dict, training: bool) -> None:
    pool, x = shaken(AimPool(16, **settings)).train(training), features()
    expected = written_out(pool, x)
    torch.testing.assert_close(pool(x), expected, atol=1e-10, rtol=1e-10)


def test_running_statistics_are_those_of_torch_and_padding_has_no_part_in_them() -> None:
    x = features(3, 5)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [True, False, True, True, False]])
    peer = nn.BatchNorm1d(16, eps=1e-6, affine=False).double()
    peer(x[mask])
    pool = AimPool(16).double().train()
    padded = pool(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    ragged = AimPool(16).double().train()
    ragged.load_state_dict(pool.state_dict() | AimPool(16).bn.double().state_dict(prefix="bn."))
    torch.testing.assert_close(ragged(Bags.from_padded(x, mask)), padded)
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(pool.bn.state_dict()[name], value)
        torch.testing.assert_close(ragged.bn.state_dict()[name], value)


def test_a_large_mean_survives_half_precision() -> None:
    pool = shaken(AimPool(16))
    x = features(4, 50) + 30
    pool.bn.running_mean.fill_(30)
    pool.bn.running_var.fill_(1)
    x = x.bfloat16().double()
    expected = pool(x)
    got = pool.bfloat16()(x.bfloat16())
    assert (got.double() - expected).abs().max() < 0.05 * expected.abs().max()


def test_default_heads_are_the_papers_or_the_largest_divisor_below() -> None:
    assert [AimPool(d).heads for d in (768, 50, 17)] == [16, 10, 1]


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"heads": 4, "queries": 3}, {"qkv_bias": True}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(AimPool(16, **settings), leave_out=left_out)


def test_wrong_heads_are_named() -> None:
    with pytest.raises(InputError, match="heads"):
        AimPool(16, heads=3)
