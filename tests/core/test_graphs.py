import pytest
import torch

from cenote.core import InputError
from cenote.core.graphs import Graphs

EDGES = torch.tensor([[4, 0, 1, 3, 1], [3, 1, 0, 4, 2]])
OFFSETS = torch.tensor([0, 3, 3, 5])


def graphs() -> Graphs:
    return Graphs(torch.arange(10.0).view(5, 2), OFFSETS, EDGES, torch.arange(5))


def test_edges_are_sorted_by_graph_and_counted() -> None:
    g = graphs()
    assert g.edges().tolist() == [3, 0, 2]
    assert g.edge_index.T.tolist() == [[0, 1], [1, 0], [1, 2], [4, 3], [3, 4]]
    assert g.edge_attr is not None
    assert g.edge_attr.tolist() == [1, 2, 4, 0, 3]


def test_chosen_graphs_take_their_edges_along() -> None:
    chosen = graphs().select(torch.tensor([2, 1, 0, 2]))
    assert chosen.offsets.tolist() == [0, 2, 2, 5, 7]
    assert chosen.edge_index.T.tolist() == [[1, 0], [0, 1], [2, 3], [3, 2], [3, 4], [6, 5], [5, 6]]
    assert chosen.edge_attr is not None
    assert chosen.edge_attr.tolist() == [0, 3, 1, 2, 4, 0, 3]
    assert torch.equal(chosen.values[5:], graphs()[2])
    marked = graphs().select(torch.tensor([False, False, True]))
    assert marked.edge_index.T.tolist() == [[1, 0], [0, 1]]


def test_another_dtype_and_other_features_keep_the_edges() -> None:
    g = graphs()
    assert g.to(torch.float64).values.dtype == torch.float64
    assert torch.equal(g.to(torch.float64).edge_index, g.edge_index)
    assert torch.equal(g.replace(torch.ones(5, 7)).edge_index, g.edge_index)


@pytest.mark.parametrize(
    ("edges", "attr", "message"),
    [
        (torch.tensor([[0], [3]]), None, "joins node 0 of graph 0 with node 3 of graph 2"),
        (torch.tensor([[0], [5]]), None, "nodes from 0 to 4, got 5"),
        (torch.tensor([[0], [-1]]), None, "got -1"),
        (torch.tensor([[0.0], [1.0]]), None, "int64"),
        (torch.tensor([0, 1]), None, "2, edges"),
        (EDGES, torch.ones(4), "edge_attr"),
    ],
)
def test_wrong_edges_are_named(edges: torch.Tensor, attr: torch.Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Graphs(torch.ones(5, 2), OFFSETS, edges, attr)
