import pytest
import torch
import torch.nn.functional as F
from tests.pools import by_rules, shaken

from cenote.core import InputError
from cenote.pool import ABMIL, PMA, ClsPool, MaxPool, WeightedLayerSum
from cenote.testing import check_layer_pool


def stack(batch: int = 2, layers: int = 4, tokens: int = 6, dim: int = 8, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, layers, tokens, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_equation() -> None:
    pool, x = shaken(WeightedLayerSum(8, layers=4)), stack()
    s = pool.scores.exp() / pool.scores.exp().sum()
    expected = sum(pool.gamma * s[i] * x[:, i] for i in range(4)).mean(1)
    torch.testing.assert_close(pool(x), expected)


def test_it_begins_as_the_mean_of_the_layers() -> None:
    x = stack()
    torch.testing.assert_close(WeightedLayerSum(8, layers=4).double()(x), x.mean((1, 2)))


def test_a_very_large_score_takes_one_layer_alone() -> None:
    pool, x = WeightedLayerSum(8, layers=4, tokens=MaxPool(8)).double(), stack()
    with torch.no_grad():
        pool.scores[2] = 1e4
    torch.testing.assert_close(pool(x), x[:, 2].amax(1))


def test_norm_forgets_the_size_of_a_layer() -> None:
    pool, x = shaken(WeightedLayerSum(8, layers=4, norm=True)), 100 * stack()
    larger = x.clone()
    larger[:, 1] *= 50
    torch.testing.assert_close(pool(larger), pool(x), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(pool.mix(x)[0, 0], pool.gamma * pool.layer_weights() @ F.layer_norm(x, (8,))[0, :, 0])


def test_permuting_layers_with_their_scores_changes_nothing() -> None:
    pool, x = shaken(WeightedLayerSum(8, layers=4)), stack()
    order = torch.tensor([2, 0, 3, 1])
    before = pool(x)
    with torch.no_grad():
        pool.scores.copy_(pool.scores[order].clone())
    torch.testing.assert_close(pool(x[:, order]), before)


def test_weights_give_the_output() -> None:
    pool, x = shaken(WeightedLayerSum(8, layers=4, tokens=ABMIL(8, hidden=4))), stack()
    mask = torch.arange(6).expand(2, 6) < torch.tensor([[6], [3]])
    output, weights = pool.attend(x, mask)
    torch.testing.assert_close(output, pool.gamma * torch.einsum("bln,blnd->bd", weights[:, 0], x))
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 1, dtype=torch.float64))


@by_rules(check_layer_pool)
@pytest.mark.parametrize("tokens", [ABMIL(8, hidden=4, heads=2), ClsPool(8)])
def test_contract_with_other_token_pools(tokens, left_out: tuple[str, ...]) -> None:
    check_layer_pool(WeightedLayerSum(8, layers=3, norm=True, tokens=tokens), leave_out=left_out)


def test_pools_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="tokens"):
        WeightedLayerSum(8, layers=3, tokens=MaxPool(9))
    with pytest.raises(InputError, match="tokens"):
        WeightedLayerSum(8, layers=3, tokens=PMA(8, 2))
