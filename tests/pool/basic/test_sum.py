import torch
from tests.pools import features

from cenote.core import Bags
from cenote.pool import SumPool


def test_is_the_sum_of_real_tokens() -> None:
    x = features(2, 4)
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    expected = torch.stack([x[0, 0] + x[0, 2], x[1].sum(0)])
    torch.testing.assert_close(SumPool(16)(x, mask), expected)
    torch.testing.assert_close(SumPool(16)(Bags.from_padded(x, mask)), expected)


def test_weights_are_one() -> None:
    _, weights = SumPool(16).attend(features(1, 3), torch.tensor([[True, False, True]]))
    assert weights.tolist() == [[[1.0, 0.0, 1.0]]]
