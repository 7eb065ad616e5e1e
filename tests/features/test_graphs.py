"""Graphs on disk: DGCNN's text and datasets of PyTorch Geometric; what is wrong with them is told by name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cenote.core import InputError
from cenote.core.graphs import Graphs
from cenote.features import describe, facts, read
from cenote.features.dataset import TokenDataset

GRAPH = "3 {label}\n0 1 1\n2 2 0 2\n1 0\n"
ITEMS = 12


def text(graphs: int = ITEMS) -> str:
    return f"{graphs}\n" + "".join(GRAPH.format(label=i % 2) for i in range(graphs))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.txt"
    path.write_text(text())
    return path


def graphs_of(data: TokenDataset) -> Graphs:
    assert isinstance(data.x, Graphs)
    return data.x


def test_dgcnn_text(file: Path) -> None:
    data = read(file)
    x = graphs_of(data)
    assert data.task == "binary"
    assert data.classes == ("0", "1")
    assert data.ids[:2] == ("0", "1")
    assert data.y.tolist() == [0, 1] * 6
    assert x[4].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    # the second node alone names the third: edges go both ways
    assert x.select(torch.tensor([5])).edge_index.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert "edges, counted in both directions: 4 to 4" in describe(data)
    assert facts(data)["edges"] == [4, 4, 4]


def test_set_pools_see_padded_nodes_and_graph_pools_the_edges(file: Path) -> None:
    data = read(file)
    items = torch.tensor([3, 1])
    assert data.batch(items)[0].shape == (2, 3, 3)
    assert data.graphs(items).edge_index.shape == (2, 8)
    assert data.has_edges
    with pytest.raises(InputError, match="no edges"):
        read("digits").graphs(items)


def test_edges_are_part_of_the_fingerprint(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text().replace("2 2 0 2\n", "2 1 0\n", 1))
    assert read(file).fingerprint() != read(other).fingerprint()
    assert read(file).fingerprint() == read(file).fingerprint()


def test_numbers_behind_the_neighbours_are_features(tmp_path: Path) -> None:
    path = tmp_path / "toy.txt"
    path.write_text(f"{ITEMS}\n" + "".join(f"2 {i % 2}\n0 1 1 0.5 -1\n0 1 0 {i} 2\n" for i in range(ITEMS)))
    assert graphs_of(read(path))[7].tolist() == [[1.0, 0.5, -1.0], [1.0, 7.0, 2.0]]


def test_a_folder_with_one_text_or_one_of_its_name(file: Path, tmp_path: Path) -> None:
    assert len(read(tmp_path)) == ITEMS
    (tmp_path / "second.txt").write_text(text(15))
    with pytest.raises(InputError, match=r"second\.txt, toy\.txt; name one"):
        read(tmp_path)
    (tmp_path / f"{tmp_path.name}.txt").write_text(text(18))
    assert len(read(tmp_path)) == 18


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 must be the number of graphs"),
        ("id,label\n", "line 1 must be the number of graphs, got 'id,label'"),
        (text().replace("12\n", "13\n", 1), "line 1 says 13 graphs, but the file ends after 12"),
        (text() + "1 2 3\n", "goes on behind its 12 graphs"),
        (text().replace("3 1\n", "3\n", 1), r"graph 1 \(line 6\): expected 'nodes label'"),
        (text()[:-5], "graph 11 .* says 3 nodes, but the file ends after 2"),
        (text().replace("2 2 0 2\n", "2 2 0 3\n", 1), r"graph 0, node 1 \(line 4\): neighbour 3 is none of its"),
        (text().replace("2 2 0 2\n", "2 3 0 2\n", 1), "says 3 neighbours, 2 follow"),
        (text().replace("2 2 0 2\n", "C 2 0 2\n", 1), "expected 'tag count neighbours...' in numbers"),
        (text().replace("2 2 0 2\n", "-1 2 0 2\n", 1), "tag -1: expected a whole number"),
        (text().replace("1 0\n", "1 0 0.5\n", 1), r"graph 0, node 2 \(line 5\)|graph 0, node 0 \(line 3\)"),
        (text().replace("3 0\n0 1 1\n2 2 0 2\n1 0\n", "0 0\n", 1), "item '0' has no tokens"),
    ],
)
def test_wrong_text_is_told_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read(path)


def saved(tmp_path: Path, listed: bool, **changes: object) -> Path:
    geometric = pytest.importorskip("torch_geometric.data")
    made = []
    for i in range(ITEMS):
        fields = {
            "x": torch.full((2 + i % 3, 4), float(i)),
            "edge_index": torch.tensor([[0, 1], [1, 0]]),
            "edge_attr": torch.full((2, 1), float(i)),
            "y": torch.tensor([i % 3]),
        }
        fields |= changes if i == 7 else {}
        made.append(geometric.Data(**{k: v for k, v in fields.items() if v is not None}))
    if listed:
        torch.save(made, tmp_path / "graphs.pt")
        return tmp_path / "graphs.pt"
    (tmp_path / "processed").mkdir()
    geometric.InMemoryDataset.save(made, str(tmp_path / "processed" / "data.pt"))
    torch.save("filter", tmp_path / "processed" / "pre_filter.pt")
    return tmp_path


@pytest.mark.parametrize("listed", [True, False])
def test_datasets_of_torch_geometric(tmp_path: Path, listed: bool) -> None:
    data = read(saved(tmp_path, listed))
    x = graphs_of(data)
    assert data.task == "multiclass"
    assert data.y.tolist() == [0, 1, 2] * 4
    assert x.lengths().tolist() == [2, 3, 4] * 4
    chosen = x.select(torch.tensor([5]))
    assert chosen.values.tolist() == [[5.0] * 4] * 4
    assert chosen.edge_index.tolist() == [[0, 1], [1, 0]]
    assert chosen.edge_attr is not None
    assert chosen.edge_attr.flatten().tolist() == [5.0, 5.0]
    assert len(read(saved_again(tmp_path, listed), labelled=False)) == ITEMS


def saved_again(tmp_path: Path, listed: bool) -> Path:
    return tmp_path / "graphs.pt" if listed else tmp_path / "processed" / "data.pt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "graph 7 has no node features x"),
        ({"y": None}, "graph 7 has no label y"),
        ({"y": torch.arange(3)}, "graph 7 has a label y for each of its 3 nodes"),
        ({"x": torch.ones(3, 5)}, "graph 7: x has shape"),
        ({"x": torch.full((3, 4), float("nan"))}, "graph 7: x holds NaN"),
        ({"edge_index": torch.tensor([[0, 9], [9, 0]])}, "graph 7: edge_index names nodes 0 to 9 of 3"),
        ({"edge_index": None}, "graph 7: edge_index is missing"),
        ({"edge_attr": torch.ones(1, 1)}, "graph 7: edge_attr has 1 rows for 2 edges"),
    ],
)
def test_wrong_datasets_name_the_graph(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(saved(tmp_path, True, **changes))


def test_files_that_are_no_datasets(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    torch.save(torch.ones(3, 4), tmp_path / "tokens.pt")
    with pytest.raises(InputError, match="holds Tensor, not what InMemoryDataset"):
        read(tmp_path / "tokens.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(InputError, match="is no dataset of PyTorch Geometric"):
        read(tmp_path / "junk.pt")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    torch.save([Trap()], tmp_path / "trap.pt")
    with pytest.raises(InputError, match="without running code"):
        read(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_without_torch_geometric_the_extra_is_named(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "graphs.pt")
    program = (
        "import sys; sys.modules['torch_geometric'] = None\n"
        "import cenote, cenote.features as f\n"
        "try: f.read(sys.argv[1])\n"
        "except cenote.InputError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "graphs.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cenote[graph]" in done.stdout


def test_benchmark_files(data_dir: Path) -> None:
    sizes = {"MUTAG": (188, 7), "PTC": (344, 22), "PROTEINS": (1113, 3), "ENZYMES": (600, 3)}
    for name, (graphs, dim) in list(sizes.items())[:1]:
        data = read(data_dir / "graphs" / f"{name}.txt")
        assert (len(data), data.dim) == (graphs, dim)
    with pytest.raises(InputError, match="name one of them"):
        read(data_dir / "graphs")
