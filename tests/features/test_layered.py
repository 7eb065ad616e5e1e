from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cenote.core import Bags, InputError
from cenote.features.dataset import TokenDataset
from cenote.features.layered import LayeredDataset, at_layer, layers_of, with_layers

ITEMS, LAYERS, TOKENS, DIM = 6, 3, 5, 4


def padded() -> LayeredDataset:
    x = torch.randn(ITEMS, LAYERS, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    y = torch.arange(ITEMS) % 2
    names = tuple(f"i{n}" for n in range(ITEMS))
    return LayeredDataset("toy", x, y, "binary", ("no", "yes"), names, torch.arange(ITEMS) % 3, layers=(0, 4, 6))


def ragged() -> LayeredDataset:
    values = torch.randn(21, LAYERS * DIM, generator=torch.Generator().manual_seed(0))
    return replace(padded(), x=Bags(values, torch.tensor([0, 1, 3, 6, 10, 15, 21])))


def test_shapes() -> None:
    for data in (padded(), ragged()):
        assert (data.dim, len(data), layers_of(data)) == (DIM, ITEMS, (0, 4, 6))
        x, mask = data.batch(torch.tensor([1, 3]))
        assert x.shape[:2] == (2, LAYERS)
        assert x.shape[-1] == DIM
        lengths = data.lengths()[[1, 3]]
        assert (mask is None) == bool((lengths == lengths[0]).all())
        for row, item in enumerate((1, 3)):
            n = int(data.lengths()[item])
            torch.testing.assert_close(x[row, :, :n], data.item(item))


def test_one_layer_is_a_plain_data_set() -> None:
    for data in (padded(), ragged()):
        for place, layer in enumerate((0, 4, 6)):
            one = data.at(layer)
            assert type(one) is TokenDataset
            assert one.dim == DIM
            for i in range(ITEMS):
                assert torch.equal(one.item(i), data.item(i)[place])
            x, mask = one.batch(torch.arange(ITEMS))
            stack, stack_mask = data.batch(torch.arange(ITEMS))
            assert torch.equal(x, stack[:, place])
            assert (mask is None) == (stack_mask is None)
        assert len({data.at(n).fingerprint() for n in data.layers} | {data.fingerprint()}) == LAYERS + 1


def test_some_layers() -> None:
    for data in (padded(), ragged()):
        some = with_layers(data, (4, 6))
        assert torch.equal(some.item(2), data.item(2)[1:])
        assert torch.equal(at_layer(some, 6).item(2), at_layer(data, 6).item(2))
        assert some.fingerprint() != data.fingerprint()
        assert with_layers(data, data.layers) is data


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="no layer 5"):
        padded().at(5)
    with pytest.raises(InputError, match="rising"):
        replace(padded(), layers=(6, 4, 0))
    with pytest.raises(InputError, match="rising"):
        replace(padded(), layers=(4, 6))
    with pytest.raises(InputError, match="one layer"):
        at_layer(padded().at(4), 4)
    with pytest.raises(InputError, match="one layer"):
        with_layers(padded().at(4), (4,))
