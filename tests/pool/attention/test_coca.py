import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, dense_attention, features, shaken

from cenote.core import InputError
from cenote.pool import CoCaPool
from cenote.testing import check_pool


@pytest.mark.parametrize("settings", [{}, {"queries": 3, "norm_tokens": True, "feedforward": 2.0, "out_dim": 12}])
def test_is_attention_whose_heads_share_keys_and_values(settings: dict) -> None:
    pool, x = shaken(CoCaPool(16, heads=3, head_dim=5, **settings)), features()
    query = F.layer_norm(pool.img_queries, (pool.out_dim,), pool.norm.weight)
    z = x if pool.context_norm is None else F.layer_norm(x, (16,), pool.context_norm.weight)
    k, v = pool.to_kv(z).chunk(2, -1)
    expected, dense = dense_attention(pool.to_q(query).expand(2, -1, -1), k.repeat(1, 1, 3), v.repeat(1, 1, 3), 3)
    expected = pool.to_out(expected)
    if pool.ff_in is not None:
        u, gate = pool.ff_in(query).chunk(2, -1)
        expected = expected + pool.ff_out(F.silu(gate) * u)
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected if pool.vectors > 1 else expected.squeeze(1))
    torch.testing.assert_close(weights, dense.flatten(1, 2))


def test_one_key_and_value_head_whatever_the_number_of_heads() -> None:
    sizes = [CoCaPool(16, heads=h, head_dim=8).to_kv.weight.shape for h in (1, 8)]
    assert sizes == [(16, 16), (16, 16)]


@by_rules(check_pool)
@pytest.mark.parametrize(
    "settings", [{"heads": 2, "head_dim": 8, "queries": 3}, {"norm_tokens": True, "feedforward": 4.0}]
)
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(CoCaPool(16, **settings), leave_out=left_out)


@pytest.mark.parametrize("named", ["heads", "head_dim", "queries"])
def test_wrong_arguments_are_named(named: str) -> None:
    with pytest.raises(InputError, match=named):
        CoCaPool(16, **{named: 0})
