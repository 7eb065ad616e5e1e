"""What the base of mixers does for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cenote.core import InputError
from cenote.mix.base import GridMixer, Mixer


class SumOfAll(Mixer):
    def mix(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return x + x.sum(1, keepdim=True) + positions.unsqueeze(-1)


class Turned(GridMixer):
    def mix_grid(self, x: Tensor, real: Tensor) -> Tensor:
        assert x.shape[2:] == real.shape[1:]
        return x.flip(-1)


def test_padding_reaches_nothing_and_comes_out_as_zeros() -> None:
    x = torch.arange(6.0).view(1, 3, 2)
    x[0, 0] = torch.nan
    mask = torch.tensor([[False, True, True]])
    found = SumOfAll()(x, mask)
    torch.testing.assert_close(found[:, 1:], SumOfAll()(x[:, 1:]))
    assert found[0, 0].tolist() == [0.0, 0.0]
    assert SumOfAll()(x, torch.zeros_like(mask)).tolist() == [[[0.0, 0.0]] * 3]
    assert SumOfAll()(x[:, :0]).shape == (1, 0, 2)


def test_positions_count_real_tokens_unless_given() -> None:
    x, mask = torch.zeros(1, 3, 1), torch.tensor([[False, True, True]])
    assert SumOfAll()(x, mask).flatten().tolist() == [0.0, 0.0, 1.0]
    assert SumOfAll()(x, mask, torch.tensor([[7, 8, 9]])).flatten().tolist() == [0.0, 8.0, 9.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": torch.zeros(2, 3)}, "x: expected"),
        ({"x": torch.zeros(1, 2, 3, dtype=torch.long)}, "x: expected"),
        ({"x": torch.zeros(1, 2, 3), "mask": torch.ones(1, 3, dtype=torch.bool)}, "mask: expected"),
        ({"x": torch.zeros(1, 2, 3), "mask": torch.ones(1, 2)}, "mask: expected bool"),
        ({"x": torch.zeros(1, 2, 3), "positions": torch.zeros(1, 2)}, "positions: expected whole numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_named(given: dict[str, Tensor], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SumOfAll()._checked(given["x"], given.get("mask"), given.get("positions"))


def test_a_grid_is_laid_row_by_row_and_what_stands_before_it_passes() -> None:
    x = torch.arange(7.0).view(1, 7, 1)
    assert Turned(grid=(2, 3), prefix=1)(x).flatten().tolist() == [0, 3, 2, 1, 6, 5, 4]
    assert Turned()(x[:, :4]).flatten().tolist() == [1, 0, 3, 2]
    for wrong in (Turned(), Turned(grid=(2, 2)), Turned(grid=(2, 3), prefix=2)):
        with pytest.raises(InputError, match="expected a grid of tokens"):
            wrong(x)
    with pytest.raises(InputError, match="prefix"):
        Turned(prefix=-1)
