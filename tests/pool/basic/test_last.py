import torch
from tests.pools import features

from cenote.core import Bags
from cenote.pool import LastPool


def test_is_the_last_real_token_wherever_the_padding_stands() -> None:
    x = features(3, 4)
    mask = torch.tensor([[True, True, False, False], [False, False, True, True], [True, True, True, True]])
    expected = torch.stack([x[0, 1], x[1, 3], x[2, 3]])
    torch.testing.assert_close(LastPool(16)(x), x[:, -1])
    torch.testing.assert_close(LastPool(16)(x, mask), expected)
    torch.testing.assert_close(LastPool(16)(Bags.from_padded(x, mask)), expected)


def test_an_empty_set_has_no_last_token() -> None:
    x = features(2, 3)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    pooled, weights = LastPool(16).attend(x, mask)
    assert not pooled[1].any()
    assert weights[:, 0].tolist() == [[0, 1, 0], [0, 0, 0]]
