import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import JepaPool
from cenote.testing import check_pool


def peer(weight: torch.Tensor, bias: torch.Tensor, proj: nn.Linear, heads: int) -> nn.MultiheadAttention:
    mha = nn.MultiheadAttention(16, heads, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(weight)
        mha.in_proj_bias.copy_(bias)
        mha.out_proj.load_state_dict(proj.state_dict())
    return mha


@pytest.mark.parametrize(("queries", "depth"), [(1, 1), (3, 1), (3, 3)])
def test_is_a_cross_attention_block_then_blocks_among_the_queries(queries: int, depth: int) -> None:
    pool, x = shaken(JepaPool(16, heads=4, queries=queries, depth=depth)), features()
    q, z = pool.query_tokens.expand(2, -1, -1), pool.norm1(x)
    weight, bias = (torch.cat([getattr(pool.q, n), getattr(pool.kv, n)]) for n in ("weight", "bias"))
    attended, dense = peer(weight, bias, pool.proj, 4)(q, z, z, average_attn_weights=False)
    y = q + attended
    y = y + pool.mlp.fc2(F.gelu(pool.mlp.fc1(pool.norm2(y))))
    for block in pool.blocks:
        layer = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True).double()
        layer.self_attn = peer(block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj, 4)
        for theirs, ours in (
            ("linear1", block.mlp.fc1),
            ("linear2", block.mlp.fc2),
            ("norm1", block.norm1),
            ("norm2", block.norm2),
        ):
            getattr(layer, theirs).load_state_dict(ours.state_dict())
        y = layer(y)
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, y if queries > 1 else y.squeeze(1))
    torch.testing.assert_close(weights, dense.flatten(1, 2))


def test_without_the_block_only_the_attention_is_left() -> None:
    pool, x = shaken(JepaPool(16, heads=4, complete_block=False)), features()
    weight, bias = (torch.cat([getattr(pool.q, n), getattr(pool.kv, n)]) for n in ("weight", "bias"))
    expected = peer(weight, bias, pool.proj, 4)(pool.query_tokens.expand(2, -1, -1), x, x)[0]
    torch.testing.assert_close(pool(x), expected.squeeze(1))


def test_initial_scale_of_the_maps_that_end_a_residual_branch() -> None:
    torch.manual_seed(0)
    pool = JepaPool(256, queries=2, depth=3)
    std = 0.02
    for linear, depth in (
        (pool.q, None),
        (pool.mlp.fc1, None),
        (pool.proj, 1),
        (pool.mlp.fc2, 1),
        (pool.blocks[0].attn.proj, 2),
        (pool.blocks[1].mlp.fc2, 3),
    ):
        expected = std if depth is None else std / (2 * depth) ** 0.5
        assert abs(float(linear.weight.std()) / expected - 1) < 0.03
        assert not linear.bias.any()


@by_rules(check_pool)
@pytest.mark.parametrize(
    "settings",
    [
        {"heads": 4, "queries": 3, "depth": 2},
        {"depth": 2, "qkv_bias": False},
        {"complete_block": False, "mlp_ratio": 2.0},
    ],
)
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(JepaPool(16, **settings), leave_out=left_out)


@pytest.mark.parametrize(("settings", "named"), [({"heads": 3}, "heads"), ({"depth": 0}, "depth")])
def test_wrong_arguments_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        JepaPool(16, **settings)
