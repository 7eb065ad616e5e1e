import torch
from tests.pools import features

from cenote import Bags
from cenote.pool import PositionWeightedMean


def test_equation() -> None:
    x = features(tokens=4)
    expected = (1 * x[:, 0] + 2 * x[:, 1] + 3 * x[:, 2] + 4 * x[:, 3]) / 10
    output, weights = PositionWeightedMean(16).attend(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights[0, 0], torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))


def test_padding_may_stand_anywhere() -> None:
    pool, x = PositionWeightedMean(16), features(tokens=3)
    for slots in ([0, 1, 2], [2, 3, 4], [0, 2, 4]):
        padded = torch.full((2, 5, 16), 9.0, dtype=x.dtype)
        padded[:, slots] = x
        mask = torch.zeros(2, 5, dtype=torch.bool)
        mask[:, slots] = True
        torch.testing.assert_close(pool(padded, mask), pool(x))


def test_ragged_sets_count_from_their_own_first_token() -> None:
    pool, x = PositionWeightedMean(16), features(1, 9)[0]
    bags = Bags.from_list([x[:4], x[:0], x[4:5], x[5:]])
    expected = torch.stack([pool(s.unsqueeze(0))[0] if len(s) else torch.zeros(16, dtype=x.dtype) for s in bags])
    torch.testing.assert_close(pool(bags), expected)


def test_equal_tokens_are_their_own_mean() -> None:
    x = torch.full((1, 30000, 2), 0.5, dtype=torch.float16)
    torch.testing.assert_close(PositionWeightedMean(2)(x), torch.full((1, 2), 0.5, dtype=torch.float16))


def test_the_last_token_weighs_n_times_the_first() -> None:
    _, weights = PositionWeightedMean(16).attend(features(tokens=9))
    torch.testing.assert_close(weights[:, 0, -1], 9 * weights[:, 0, 0])
