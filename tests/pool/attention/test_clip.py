import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, features, shaken

from cenote.core import Bags, InputError
from cenote.pool import ClipPool
from cenote.testing import check_pool


@pytest.mark.parametrize("width", [16, 24])
def test_is_token_zero_of_full_self_attention(width: int) -> None:
    pool, x = shaken(ClipPool(16, tokens=9, out_dim=10, width=width)), features()
    z = F.layer_norm(x, (16,), pool.norm.weight, pool.norm.bias, 1e-6)
    t = torch.cat([z.mean(1, keepdim=True), z], 1) + pool.pos_embed
    q, k, v = pool.qkv(t).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    expected = pool.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))[:, 0]
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, expected)
    dense = (q[:, :, :1] @ k.transpose(-1, -2) / (width // 4) ** 0.5).softmax(-1)
    torch.testing.assert_close(weights, dense[:, :, 0, 1:])


def test_masked_patches_are_hidden_and_the_others_keep_their_positions() -> None:
    pool, x = shaken(ClipPool(16, tokens=9)), features()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 3:6] = False
    kept = shaken(ClipPool(16, tokens=6))
    state = pool.state_dict()
    rows = [0, 1, 2, 3, 7, 8, 9]
    kept.load_state_dict(state | {"pos_embed": state["pos_embed"][rows]})
    torch.testing.assert_close(pool(x, mask), kept(x[mask].view(2, 6, 16)))


def test_positions_matter() -> None:
    pool, x = shaken(ClipPool(16, tokens=9)), features()
    assert not torch.allclose(pool(x), pool(x.flip(1)))


def test_another_number_of_tokens_is_refused() -> None:
    pool, x = shaken(ClipPool(16, tokens=9)), features()
    torch.testing.assert_close(pool(Bags.from_padded(x)), pool(x))
    with pytest.raises(InputError, match="9 tokens, got 8"):
        pool(x[:, :8])


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"heads": 2, "out_dim": 5}, {"width": 24, "qkv_bias": False}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(ClipPool(16, tokens=9, **settings), leave_out=left_out)


def test_wrong_heads_are_named() -> None:
    with pytest.raises(InputError, match="heads"):
        ClipPool(16, tokens=9, heads=3)
