import torch
from tests.pools import features

from cenote.core import Bags
from cenote.pool import StatisticsPool


def test_is_mean_and_population_standard_deviation_of_real_tokens() -> None:
    x = features(2, 5)
    mask = torch.tensor([[True, False, True, False, True], [True] * 5])
    sets = [x[0, [0, 2, 4]], x[1]]
    expected = torch.stack([torch.cat([s.mean(0), (s.var(0, correction=0) + 1e-8).sqrt()]) for s in sets])
    pool = StatisticsPool(16)
    assert pool.out_dim == 32
    torch.testing.assert_close(pool(x, mask), expected)
    torch.testing.assert_close(pool(Bags.from_padded(x, mask)), expected)


def test_equal_tokens_have_a_finite_gradient() -> None:
    x = torch.ones(1, 4, 2, dtype=torch.float64, requires_grad=True)
    StatisticsPool(2)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.25))
