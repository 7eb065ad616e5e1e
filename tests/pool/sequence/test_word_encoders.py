from __future__ import annotations

import pytest
import torch
from tests.pools import features, randn, shaken
from torch import nn

from cenote.core import InputError
from cenote.pool import ConvolutionEncoder, PlaceEmbedding, RecurrentEncoder, TreeConvolution, TreeEncoder, Vocabulary

MASK = torch.arange(6).expand(2, 6) < torch.tensor([[6], [4]])
HEADS = torch.tensor([[1, -1, 1, 2, 2, 4], [1, -1, 1, 2, -2, -2]])


def test_convolutions_written_out() -> None:
    x = features(2, 6, 5)
    encoder = shaken(ConvolutionEncoder(5, 3, (2, 3)))
    two, three = encoder.maps
    wide = nn.functional.pad(x, (0, 0, 1, 1))
    for n in range(6):
        seen = torch.einsum("bkd,fdk->bf", wide[:, n : n + 3], three.weight) + three.bias
        torch.testing.assert_close(encoder(x)[:, n, 3:], torch.relu(seen))
        seen = torch.einsum("bkd,fdk->bf", wide[:, n + 1 : n + 3], two.weight) + two.bias
        torch.testing.assert_close(encoder(x)[:, n, :3], torch.relu(seen))


def test_tree_convolutions_written_out() -> None:
    x, encoder = features(2, 6, 5), shaken(TreeConvolution(5, 4, layers=1))
    (map_,) = encoder.maps
    # word 2 of the first sentence hangs on 1; 3 and 4 hang on it
    around = x[0, [1, 2, 3, 4]] @ map_.weight.T
    torch.testing.assert_close(encoder(x, HEADS)[0, 2], torch.relu(around.mean(0) + map_.bias))


@pytest.mark.parametrize(
    "build", [lambda: ConvolutionEncoder(5, 3), lambda: RecurrentEncoder(5, 3, layers=2), lambda: TreeEncoder(5, 3)]
)
def test_padding_and_batch_mates_do_nothing(build: type[nn.Module]) -> None:
    encoder = shaken(build())
    more = (HEADS,) if isinstance(encoder, TreeEncoder) else ()
    x = features(2, 6, 5).masked_fill(~MASK.unsqueeze(-1), float("nan"))
    whole = encoder(x, MASK, *more)
    assert whole.shape == (2, 6, encoder.out_dim)
    alone = encoder(x[1:, :4], None, *(h[1:, :4] for h in more))
    torch.testing.assert_close(whole[1, :4], alone[0])


def test_ends_are_the_last_states_of_each_direction() -> None:
    encoder, x = shaken(RecurrentEncoder(5, 3)), features(2, 6, 5)
    states = encoder(x, MASK)
    _, (last, _) = encoder.lstm(x[1:, :4])
    torch.testing.assert_close(encoder.ends(states, MASK)[1], last[:, 0].flatten())


def test_one_direction_gives_its_states() -> None:
    encoder, x = shaken(RecurrentEncoder(5, 3, bidirectional=False)), features(2, 6, 5)
    torch.testing.assert_close(encoder(x), encoder.lstm(x)[0])
    torch.testing.assert_close(encoder.ends(encoder(x)), encoder(x)[:, -1])


def test_distances_beyond_the_reach_count_as_the_furthest() -> None:
    places = PlaceEmbedding(2, 3).double()
    found = places(torch.tensor([[3]]), 7)[0]
    torch.testing.assert_close(found, places.table.weight[[0, 0, 1, 2, 3, 3, 3]])


def test_names_have_numbers() -> None:
    names = Vocabulary.learn([["b", "a", "b"], ["c"]], at_least=2)
    assert (len(names), names["b"], names["a"]) == (3, 2, 1)
    ids, mask = names.batch([])
    assert ids.shape == mask.shape == (0, 0)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="mask: expected padding behind"):
        RecurrentEncoder(5, 3).double()(randn(1, 3, 5), torch.tensor([[False, True, True]]))
    with pytest.raises(InputError, match="heads: this encoder reads the tree"):
        TreeEncoder(5, 3).double()(randn(1, 3, 5))
    with pytest.raises(InputError, match="windows"):
        ConvolutionEncoder(5, 3, ())
