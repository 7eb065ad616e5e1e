import torch
from tests.pools import features

from cenote.core import Bags
from cenote.pool import MeanPool


def test_is_the_mean_of_real_tokens() -> None:
    x = features(2, 4)
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    expected = torch.stack([(x[0, 0] + x[0, 2]) / 2, x[1].mean(0)])
    torch.testing.assert_close(MeanPool(16)(x, mask), expected)
    torch.testing.assert_close(MeanPool(16)(Bags.from_padded(x, mask)), expected)


def test_weights_are_one_over_the_number_of_real_tokens() -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    _, weights = MeanPool(16).attend(features(2, 4), mask)
    assert weights.tolist() == [[[0.5, 0.0, 0.5, 0.0]], [[0.25] * 4]]
    _, weights = MeanPool(16).attend(Bags.from_padded(features(2, 4), mask))
    assert weights.tolist() == [[0.5, 0.5, 0.25, 0.25, 0.25, 0.25]]


def test_many_half_precision_tokens_keep_their_mean() -> None:
    x = torch.full((1, 5000, 2), 30.0, dtype=torch.float16)
    torch.testing.assert_close(MeanPool(2)(x), x[:, 0])
