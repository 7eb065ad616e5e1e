import pytest
import torch
from tests.pools import by_rules, dense_attention, features, shaken

from cenote.core import InputError
from cenote.pool import CaePool
from cenote.testing import check_pool


@pytest.mark.parametrize("settings", [{}, {"heads": 3, "head_dim": 7, "qkv_bias": True}])
def test_equals_attention_written_out(settings: dict) -> None:
    pool, x = shaken(CaePool(16, **settings)), features()
    query = pool.q(pool.norm1_q(pool.query_token)).expand(2, -1, -1)
    attended, dense = dense_attention(query, pool.k(pool.norm1_k(x)), pool.v(pool.norm1_v(x)), pool.heads)
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, pool.proj(attended).squeeze(1))
    torch.testing.assert_close(weights, dense.squeeze(2))


def test_at_first_it_is_a_mean() -> None:
    """The query starts as zeros, and its LayerNorm and map without biases leave it there."""
    pool, x = CaePool(16).double(), features()
    output, weights = pool.attend(x)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 9))
    torch.testing.assert_close(output, pool.proj(pool.v(pool.norm1_v(x)).mean(1)))


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"heads": 2}, {"heads": 3, "head_dim": 7, "qkv_bias": True}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(CaePool(16, **settings), leave_out=left_out)


def test_wrong_heads_are_named() -> None:
    with pytest.raises(InputError, match="heads"):
        CaePool(16, heads=3)
