import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import CaiTPool
from cenote.testing import check_pool


@pytest.mark.parametrize("depth", [1, 3])
def test_is_attention_over_cls_and_tokens_together(depth: int) -> None:
    pool, x = shaken(CaiTPool(16, heads=4, depth=depth)), features()
    cls = pool.cls_token.expand(2, 1, 16)
    for block in pool.blocks:
        mha = nn.MultiheadAttention(16, 4, batch_first=True).double()
        with torch.no_grad():
            mha.in_proj_weight.copy_(torch.cat([block.q.weight, block.k.weight, block.v.weight]))
            mha.in_proj_bias.copy_(torch.cat([block.q.bias, torch.zeros(16), block.v.bias]))
            mha.out_proj.load_state_dict(block.proj.state_dict())
        z = F.layer_norm(torch.cat([cls, x], 1), (16,), block.norm1.weight, block.norm1.bias, 1e-6)
        attended, dense = mha(z[:, :1], z, z, average_attn_weights=False)
        cls = cls + block.gamma_1 * attended
        hidden = F.layer_norm(cls, (16,), block.norm2.weight, block.norm2.bias, 1e-6)
        cls = cls + block.gamma_2 * block.mlp.fc2(F.gelu(block.mlp.fc1(hidden)))
    expected = F.layer_norm(cls[:, 0], (16,), pool.norm.weight, pool.norm.bias)
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, dense[:, :, 0, 1:])


def test_first_layer_scale_is_tiny() -> None:
    pool = CaiTPool(16).double().eval()
    output = pool(features())
    torch.testing.assert_close(output[0], output[1], atol=1e-2, rtol=0)
    assert not torch.equal(output[0], output[1])


@by_rules(check_pool)
@pytest.mark.parametrize(
    "settings", [{"heads": 1, "depth": 2}, {"qkv_bias": False, "mlp_ratio": 2.0, "init_scale": 0.1}]
)
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(CaiTPool(16, **settings), leave_out=left_out)


@pytest.mark.parametrize(("settings", "named"), [({"heads": 3}, "heads"), ({"depth": 0}, "depth")])
def test_wrong_arguments_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        CaiTPool(16, **settings)
