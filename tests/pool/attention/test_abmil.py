import pytest
import torch
from tests.pools import by_rules, features, shaken

from cenote.pool import ABMIL
from cenote.testing import check_pool


def test_equation() -> None:
    pool, x = shaken(ABMIL(16, hidden=8)), features()
    v = torch.tanh(x @ pool.tanh.weight.T + pool.tanh.bias)
    u = torch.sigmoid(x @ pool.gate.weight.T + pool.gate.bias)
    a = ((v * u) @ pool.score.weight[0]).softmax(-1)
    output, weights = pool.attend(x)
    torch.testing.assert_close(output, (a.unsqueeze(-1) * x).sum(1))
    torch.testing.assert_close(weights, a.unsqueeze(1))


def test_without_gate() -> None:
    pool, x = shaken(ABMIL(16, hidden=8, gated=False)), features()
    a = (torch.tanh(pool.tanh(x)) @ pool.score.weight[0]).softmax(-1)
    torch.testing.assert_close(pool(x), (a.unsqueeze(-1) * x).sum(1))


def test_a_score_vector_of_zeros_is_the_mean() -> None:
    pool, x = shaken(ABMIL(16)), features()
    with torch.no_grad():
        pool.score.weight.zero_()
    torch.testing.assert_close(pool(x), x.mean(1))


def test_heads_stand_side_by_side() -> None:
    pool, x = shaken(ABMIL(16, hidden=8, heads=3)), features()
    single = ABMIL(16, hidden=8).double()
    state = pool.state_dict()
    for head in range(3):
        single.load_state_dict(state | {"score.weight": state["score.weight"][head : head + 1]})
        torch.testing.assert_close(pool(x)[:, 16 * head : 16 * (head + 1)], single(x))


@by_rules(check_pool)
@pytest.mark.parametrize("settings", [{"heads": 3}, {"gated": False, "heads": 2}, {"hidden": 1}])
def test_contract_of_variants(settings: dict, left_out: tuple[str, ...]) -> None:
    check_pool(ABMIL(16, **settings), leave_out=left_out)
