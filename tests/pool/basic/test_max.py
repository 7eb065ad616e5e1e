import torch
from tests.pools import features

from cenote.core import Bags
from cenote.pool import MaxPool


def test_is_the_largest_value_of_each_channel_of_real_tokens() -> None:
    x = features(2, 4)
    mask = torch.tensor([[True, False, True, False], [True, True, True, True]])
    expected = torch.stack([torch.maximum(x[0, 0], x[0, 2]), x[1].amax(0)])
    torch.testing.assert_close(MaxPool(16)(x, mask), expected)
    torch.testing.assert_close(MaxPool(16)(Bags.from_padded(x, mask)), expected)


def test_negative_maxima_are_not_replaced_by_padding() -> None:
    x = torch.tensor([[[-3.0], [-2.0], [100.0]]])
    assert MaxPool(1)(x, torch.tensor([[True, True, False]])).tolist() == [[-2.0]]


def test_weights_are_the_share_of_channels_that_a_token_holds_and_ties_share() -> None:
    x = torch.tensor([[[3.0, 0.0, 5.0, 1.0], [3.0, 2.0, 0.0, 9.0]]])
    _, weights = MaxPool(4).attend(x)
    assert weights.tolist() == [[[0.375, 0.625]]]
