import pytest
import torch
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import DinoViTPool
from cenote.testing import check_pool


def test_is_torchs_own_encoder_layer_then_the_mean_of_real_tokens() -> None:
    pool, x = shaken(DinoViTPool(16, qkv_bias=True)), features(3)
    mask = torch.tensor([[True] * 9, [True, False, True] * 3, [True] + [False] * 8])
    layer = nn.TransformerEncoderLayer(16, 8, 64, 0.0, "gelu", batch_first=True, norm_first=True).double()
    ours = pool.block
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(ours.attn.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(ours.attn.qkv.bias)
    layer.self_attn.out_proj.load_state_dict(ours.attn.proj.state_dict())
    for name, module in (
        ("linear1", ours.mlp.fc1),
        ("linear2", ours.mlp.fc2),
        ("norm1", ours.norm1),
        ("norm2", ours.norm2),
    ):
        getattr(layer, name).load_state_dict(module.state_dict())
    torch.testing.assert_close(pool(x), layer(x).mean(1))
    hidden = layer(x, src_key_padding_mask=~mask)
    expected = torch.stack([h[m].mean(0) for h, m in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(pool(x, mask), expected)


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"heads": 2, "qkv_bias": True}, {"mlp_ratio": 1.5}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(DinoViTPool(16, **settings), leave_out=left_out)


def test_wrong_heads_are_named() -> None:
    with pytest.raises(InputError, match="heads"):
        DinoViTPool(16, heads=3)
