import pytest
import torch
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import MHCAPool
from cenote.testing import check_pool


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("plan", ["absorbed", "projected"])
def test_is_torchs_own_multi_head_attention(queries: int, plan: str) -> None:
    pool, x = shaken(MHCAPool(16, queries=queries, plan=plan)), features()
    mha = nn.MultiheadAttention(16, 8, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.k.weight, pool.v.weight]))
        mha.in_proj_bias.copy_(torch.cat([pool.q.bias, torch.zeros(16), pool.v.bias]))
    mha.out_proj.load_state_dict(pool.proj.state_dict())
    expected, dense = mha(pool.query.expand(2, -1, -1), x, x, average_attn_weights=False)
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected if queries > 1 else expected.squeeze(1))
    torch.testing.assert_close(weights, dense.flatten(1, 2))


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"heads": 2, "queries": 3}, {"bias": False}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(MHCAPool(16, **settings), leave_out=left_out)


def test_wrong_heads_are_named() -> None:
    with pytest.raises(InputError, match="heads"):
        MHCAPool(16, heads=3)
