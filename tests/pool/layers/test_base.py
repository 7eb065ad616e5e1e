import pytest
import torch

from cenote.core import InputError
from cenote.pool import WeightedLayerSum, stack_layers


def test_the_embeddings_are_left_out_unless_asked_for() -> None:
    hidden = [torch.full((2, 3, 4), float(i)) for i in range(5)]
    assert stack_layers(hidden)[0, :, 0, 0].tolist() == [1, 2, 3, 4]
    assert stack_layers(hidden, embeddings=True)[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_what_cannot_be_stacked_is_named() -> None:
    with pytest.raises(InputError, match="output_hidden_states"):
        stack_layers([torch.zeros(2, 3, 4)])
    with pytest.raises(InputError, match="same shape"):
        stack_layers([torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)])


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(InputError, match="dim"):
        WeightedLayerSum(0, layers=2)
    with pytest.raises(InputError, match="layers"):
        WeightedLayerSum(4, layers=0)
    pool = WeightedLayerSum(4, layers=2)
    with pytest.raises(InputError, match="built for 2 layers, got 3"):
        pool(torch.zeros(1, 3, 5, 4))
    with pytest.raises(InputError, match="stack_layers"):
        pool([torch.zeros(1, 5, 4)] * 2)
