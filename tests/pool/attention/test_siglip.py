import pytest
import torch
import torch.nn.functional as F
from tests import tiny
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import SigLipPool
from cenote.testing import check_pool


@pytest.mark.parametrize("norm", [False, True])
def test_is_multi_head_attention_and_an_mlp(norm: bool) -> None:
    pool, x = shaken(SigLipPool(16, heads=4, norm=norm)), features()
    mha = nn.MultiheadAttention(16, 4, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
        mha.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
        mha.out_proj.load_state_dict(pool.proj.state_dict())
    latent, dense = mha(pool.latent.expand(2, 1, 16), x, x, average_attn_weights=False)
    hidden = F.layer_norm(latent, (16,), pool.norm.weight, pool.norm.bias) if norm else latent
    expected = latent + pool.mlp.fc2(F.gelu(pool.mlp.fc1(hidden)))
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected.squeeze(1))
    torch.testing.assert_close(weights, dense.squeeze(2))


@pytest.mark.parametrize("pool_type", ["token", "avg", ""])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_weights_of_timm_load(pool_type: str, qk_norm: bool) -> None:
    layers = tiny.timm_models().layers
    latents = 1 if pool_type == "token" else 3
    theirs = layers.AttentionPoolLatent(
        16, num_heads=4, latent_len=latents, pool_type=pool_type, qk_norm=qk_norm, norm_layer=nn.LayerNorm
    )
    theirs = shaken(theirs)
    ours = SigLipPool(16, heads=4, queries=latents, average=pool_type == "avg", norm=True, qk_norm=qk_norm).double()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "k_norm.bias"})
    torch.testing.assert_close(ours(features()), theirs(features()))


def test_several_latents() -> None:
    pool, x = shaken(SigLipPool(16, queries=3)), features()
    averaged = SigLipPool(16, queries=3, average=True).double()
    averaged.load_state_dict(pool.state_dict())
    first = SigLipPool(16).double()
    first.load_state_dict(pool.state_dict() | {"latent": pool.latent[:, :1]})
    assert pool(x).shape == (2, 3, 16)
    torch.testing.assert_close(averaged(x), pool(x).mean(1))
    torch.testing.assert_close(first(x), pool(x)[:, 0])


@by_rules(check_pool)
@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 4, "queries": 3},
        {"queries": 2, "average": True, "qkv_bias": False},
        {"heads": 2, "qk_norm": True, "norm": True},
    ],
)
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(SigLipPool(16, **settings), leave_out=left_out)


def test_wrong_heads_are_named() -> None:
    with pytest.raises(InputError, match="heads"):
        SigLipPool(16, heads=3)
