"""Items and where their tokens are: views, fingerprints that stored results are found by, and what travels."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from cenote.core import Bags, InputError
from cenote.core.graphs import Graphs
from cenote.features import LayeredDataset, TokenDataset
from cenote.features.tokens import Nodes, Padded, PaddedLayers, Ragged, RaggedLayers, WithEdges, stacked

ITEMS, LAYERS, TOKENS, DIM = 6, 3, 5, 4
OFFSETS = torch.tensor([0, 1, 3, 6, 10, 15, 21])


def labelled(x: object) -> TokenDataset:
    names = tuple(f"i{n}" for n in range(ITEMS))
    return TokenDataset("toy", x, torch.arange(ITEMS) % 2, "binary", ("no", "yes"), names, torch.arange(ITEMS) % 3)  # type: ignore[arg-type]


def padded() -> TokenDataset:
    x = torch.randn(ITEMS, LAYERS, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    y = torch.arange(ITEMS) % 2
    names = tuple(f"i{n}" for n in range(ITEMS))
    return LayeredDataset("toy", x, y, "binary", ("no", "yes"), names, torch.arange(ITEMS) % 3, layers=(0, 4, 6))


def ragged() -> TokenDataset:
    values = torch.randn(21, LAYERS * DIM, generator=torch.Generator().manual_seed(0))
    return replace(padded(), x=stacked(Bags(values, OFFSETS), (0, 4, 6)))


def graphs() -> TokenDataset:
    values = torch.arange(21 * DIM).view(21, DIM) / 8
    return labelled(Graphs(values, OFFSETS, torch.tensor([[1, 2, 9], [2, 1, 6]]), torch.tensor([1.0, 2.0, 3.0])))


def test_each_form_has_its_source() -> None:
    sources = [padded(), padded().at(4), ragged(), ragged().at(4), graphs(), graphs().with_edges()]
    assert [type(d.token_source) for d in sources] == [PaddedLayers, Padded, RaggedLayers, Ragged, Nodes, WithEdges]
    assert {type(d) for d in sources} == {TokenDataset}
    assert [d.pads for d in sources] == [True] * 5 + [False]
    assert [d.layers for d in sources] == [(0, 4, 6), ()] * 2 + [(), ()]


def test_shapes() -> None:
    for data in (padded(), ragged()):
        assert (data.dim, len(data), data.layers) == (DIM, ITEMS, (0, 4, 6))
        assert data.tokens == (TOKENS if data.lengths().unique().numel() == 1 else None)
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
        for at, layer in enumerate((0, 4, 6)):
            one = data.at(layer)
            assert isinstance(one.x, torch.Tensor | Bags)
            assert one.dim == DIM
            for i in range(ITEMS):
                assert torch.equal(one.item(i), data.item(i)[at])
            x, mask = one.batch(torch.arange(ITEMS))
            stack, stack_mask = data.batch(torch.arange(ITEMS))
            assert torch.equal(x, stack[:, at])
            assert (mask is None) == (stack_mask is None)
        assert torch.equal(data.at(-1).item(5), data.item(5)[2])
        assert len({data.at(n).fingerprint() for n in data.layers} | {data.fingerprint()}) == LAYERS + 1


def test_some_layers() -> None:
    for data in (padded(), ragged()):
        some = data.only((4, 6))
        assert some.layers == (4, 6)
        assert torch.equal(some.item(2), data.item(2)[1:])
        assert torch.equal(some.at(6).item(2), data.at(6).item(2))
        assert some.fingerprint() != data.fingerprint()
        assert data.only(data.layers) is data


def test_single_items_are_not_copied() -> None:
    for data in (padded(), padded().at(4), ragged(), ragged().at(4), graphs()):
        given = data.in_memory().token_source
        values = given.x if isinstance(given, Padded) else given.bags.values  # type: ignore[attr-defined]
        assert data.item(3).untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    for data in (ragged(), ragged().at(4), graphs()):
        x, mask = data.batch(torch.tensor([3]))
        assert mask is None
        assert torch.equal(x[0], data.item(3))
        assert x.untyped_storage().data_ptr() == data.item(3).untyped_storage().data_ptr()


def test_graphs_are_sets_until_their_edges_are_asked_for() -> None:
    data = graphs()
    edges = data.with_edges()
    assert data.has_edges
    assert edges.has_edges
    assert data.batch(torch.tensor([1, 2]))[0].shape == (2, 3, DIM)
    both, mask = edges.batch(torch.tensor([3, 1]))
    assert mask is None
    assert both.edge_index.tolist() == [[3, 4, 5], [0, 5, 4]]
    assert edges.fingerprint() == data.fingerprint()
    twice = edges.copies(1, 2)
    assert (len(twice), twice.edges().tolist()) == (2, [2, 2])
    assert data.copies(1, 2).shape == (2, 2, DIM)
    for other in (padded(), ragged().at(4)):
        with pytest.raises(InputError, match="no edges"):
            other.with_edges()
        with pytest.raises(InputError, match="no edges"):
            other.graphs(torch.tensor([0]))


def exact(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) / 8


@pytest.mark.parametrize(
    ("form", "known"),
    [
        ("padded", "a240ecee5f5e7b9243e9effde2dfcf408de2d5506b7fe36c691f66dea3b955fd"),
        ("ragged", "9e03f7032d8b5bf7376d6ca3a08112eabb56dae14619cc1091b0a1bc2993d23c"),
        ("half", "7ad9b80a20791f365784e7cd41059f76baa7080e3cdb7ee3aa3eaf9a3cadb316"),
        ("graphs", "56a9b0e14bdb5e5c189d93bad0a2118234f9a3c5b91b2af7d50b8370234b3a2a"),
        ("layers", "f1937f9ee639a1c13f6bf6fe1147a6e9a2067246bc6f7de3e3c5c47688999747"),
        ("ragged layers", "8201ddb58ff693a0128ac1757aea38f702eca55ffe225d2026f4a30c24c9cc2f"),
    ],
)
def test_fingerprints_never_change(form: str, known: str) -> None:
    """Cells on disk are found by them; these were computed when a data set had a class of its own for each form."""
    made = {
        "padded": lambda: exact((ITEMS, TOKENS, DIM)),
        "ragged": lambda: Bags(exact((21, DIM)), OFFSETS),
        "half": lambda: exact((ITEMS, TOKENS, DIM)).bfloat16(),
        "graphs": lambda: graphs().x,
        "layers": lambda: stacked(exact((ITEMS, LAYERS, TOKENS, DIM)), (0, 4, 6)),
        "ragged layers": lambda: stacked(Bags(exact((21, LAYERS * DIM)), OFFSETS), (0, 4, 6)),
    }
    assert labelled(made[form]()).fingerprint() == known


def test_all_of_it_travels() -> None:
    for data in (padded(), padded().at(4), ragged(), ragged().at(4), graphs(), graphs().with_edges()):
        data.batch(torch.tensor([0, 2]))
        sent = pickle.dumps(data)
        there = pickle.loads(sent)
        assert there.fingerprint() == data.fingerprint()
        assert type(there.token_source) is type(data.token_source)
        bare = replace(there, images=None, words=None)
        assert torch.equal(bare.item(3), data.item(3))
        assert bare.layers == data.layers
    # what was asked of the source does not travel beside the tokens
    large = labelled(torch.zeros(ITEMS, 400, DIM))
    assert large.dim == DIM
    assert len(pickle.dumps(large)) < 1.5 * large.nbytes()


def test_labels_of_tokens() -> None:
    marks = torch.arange(21)
    assert replace(ragged(), token_labels=marks).labels_of(3).tolist() == [6, 7, 8, 9]
    assert replace(padded(), token_labels=torch.arange(30).view(6, 5)).labels_of(1).tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(InputError, match="no labels"):
        padded().labels_of(0)


def test_wrong_input_is_named() -> None:
    for data in (padded(), ragged()):
        with pytest.raises(InputError, match="there is no layer 5; there are 0, 4, 6"):
            data.at(5)
        with pytest.raises(InputError, match="no layer -4"):
            data.only((-4, 6))
    x = exact((ITEMS, LAYERS, TOKENS, DIM))
    for layers in ((6, 4, 0), (4, 6), ()):
        with pytest.raises(InputError, match="rising"):
            stacked(x, layers)
    with pytest.raises(InputError, match="rising"):
        stacked(Bags(exact((21, LAYERS * DIM + 1)), OFFSETS), (4, 6))
    with pytest.raises(InputError, match="one layer"):
        padded().at(4).at(4)
    with pytest.raises(InputError, match="one layer"):
        ragged().at(4).only((4,))
    with pytest.raises(InputError, match="are a LayeredDataset"):
        labelled(x)
    with pytest.raises(InputError, match="ids: expected one for each of the 7 items of x, got 6"):
        labelled(torch.zeros(7, TOKENS, DIM))
    with pytest.raises(InputError, match="y: expected one for each of the 6 items"):
        replace(padded(), y=torch.zeros(5))
