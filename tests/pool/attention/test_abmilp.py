import pytest
import torch
from tests.pools import by_rules, features, shaken
from torch import nn

from cenote.core import Bags, InputError
from cenote.pool import ABMILP, ABMILPPositions
from cenote.pool.attention.abmilp import sincos_positions
from cenote.testing import check_pool


@pytest.mark.parametrize("self_attention", ["none", "map"])
def test_a_last_layer_of_zeros_is_the_mean(self_attention: str) -> None:
    pool, x = shaken(ABMILP(16, self_attention)), features()
    with torch.no_grad():
        pool.score.weight.zero_()
    torch.testing.assert_close(pool(x), x.mean(1))


def peer_self_attention(pool: ABMILP, x: torch.Tensor) -> torch.Tensor:
    mha = nn.MultiheadAttention(16, 1, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(pool.self_attn.qkv.weight)
        mha.in_proj_bias.zero_()
        mha.out_proj.load_state_dict(pool.self_attn.proj.state_dict())
    return mha(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("self_attention", ["none", "map", "both"])
@pytest.mark.parametrize(("activation", "function"), [("tanh", torch.tanh), ("relu", torch.relu)])
def test_equation(self_attention: str, activation: str, function) -> None:
    pool, x = shaken(ABMILP(16, self_attention, activation, depth=3)), features()
    z = x if self_attention == "none" else peer_self_attention(pool, x)
    first, second = pool.hidden
    a = (function(second(function(first(z)))) @ pool.score.weight[0]).softmax(-1)
    output, weights = pool.attend(x)
    values = z if self_attention == "both" else x
    torch.testing.assert_close(output, (a.unsqueeze(-1) * values).sum(1))
    torch.testing.assert_close(weights, a.unsqueeze(1))


def test_positions_of_a_grid() -> None:
    table = sincos_positions(8, 3).double()
    w = torch.tensor([1.0, 0.01], dtype=torch.float64)
    # the fourth patch of a 3 x 3 grid: row 1, column 0; the sixth: row 1, column 2
    zero, one, two = (torch.cat([(p * w).sin(), (p * w).cos()]) for p in (0, 1, 2))
    torch.testing.assert_close(table[3], torch.cat([zero, one]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(table[5], torch.cat([two, one]), atol=1e-6, rtol=1e-6)
    assert len(table.unique(dim=0)) == 9


def test_positions_enter_the_scores_only() -> None:
    pool = shaken(ABMILPPositions(16, tokens=9, self_attention="none"))
    same = features(tokens=1).expand(2, 9, 16)
    output, weights = pool.attend(same)
    torch.testing.assert_close(output, same[:, 0])
    assert weights.std() > 1e-3
    x = features()
    a = (torch.tanh(pool.hidden[0](x + pool.pos_embed)) @ pool.score.weight[0]).softmax(-1)
    torch.testing.assert_close(pool(x), (a.unsqueeze(-1) * x).sum(1))


def test_bags_of_full_size_are_fine_and_others_are_refused() -> None:
    pool, x = shaken(ABMILPPositions(16, tokens=9)), features()
    torch.testing.assert_close(pool(Bags.from_padded(x)), pool(x))
    with pytest.raises(InputError, match="9 tokens, got 4"):
        pool(x[:, :4])
    with pytest.raises(InputError, match="9 tokens, got 4"):
        pool(Bags.from_padded(x[:, :4]))


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"self_attention": "none", "depth": 3}, {"self_attention": "map"}, {"depth": 1}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(ABMILP(16, **settings), leave_out=left_out)
    check_pool(ABMILPPositions(10, tokens=9, **settings), leave_out=left_out)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"self_attention": "all"}, "self_attention"), ({"activation": "gelu"}, "activation"), ({"depth": 0}, "depth")],
)
def test_wrong_arguments_are_named(settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        ABMILP(16, **settings)


def test_a_grid_must_be_square() -> None:
    with pytest.raises(InputError, match="tokens"):
        ABMILPPositions(16, tokens=12)
