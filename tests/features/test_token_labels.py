"""`token_labels` come back the same from every format, and what does not fit is told by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from cenote.core import InputError
from cenote.features import describe, read

from .conftest import ITEMS, table

SUFFIXES = [".npz", ".safetensors", ".h5", ".pt"]


def marks(bags: list[np.ndarray]) -> list[np.ndarray]:
    """The second token of every item with an odd number, counted from 0."""
    return [(np.arange(len(bag)) == 1) & (i % 2 == 1) for i, bag in enumerate(bags)]


def save_with(path: Path, bag: np.ndarray, labels: np.ndarray) -> None:
    """Features and labels in one file."""
    match path.suffix:
        case ".npz":
            np.savez(path, features=bag, token_labels=labels)
        case ".safetensors":
            save_file({"x": torch.from_numpy(bag), "token_labels": torch.from_numpy(labels)}, path)
        case ".h5":
            h5py = pytest.importorskip("h5py")
            with h5py.File(path, "w") as file:
                file["features"], file["token_labels"] = bag, labels
        case ".pt":
            torch.save({"features": torch.from_numpy(bag), "token_labels": torch.from_numpy(labels)}, path)


def save_alone(path: Path, values: np.ndarray) -> None:
    """One array in a file."""
    match path.suffix:
        case ".npy":
            np.save(path, values)
        case ".npz":
            np.savez(path, values)
        case ".safetensors":
            save_file({"mask": torch.from_numpy(values)}, path)
        case ".h5":
            h5py = pytest.importorskip("h5py")
            with h5py.File(path, "w") as file:
                file["mask"] = values
        case ".pt":
            torch.save(torch.from_numpy(values), path)


def assert_marked(path: Path, expected: list[np.ndarray]) -> None:
    data = read(path)
    assert data.token_labels is not None
    assert data.token_labels.dtype == torch.int64
    assert data.token_labels.shape == ((ITEMS, len(expected[0])) if data.tokens else (sum(map(len, expected)),))
    assert data.token_labels.flatten().tolist() == np.concatenate(expected).astype(int).tolist()


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_in_the_items_own_file(tmp_path: Path, bags: list[np.ndarray], suffix: str, kind: type) -> None:
    for i, (bag, marked) in enumerate(zip(bags, marks(bags), strict=True)):
        save_with(tmp_path / f"item{i}{suffix}", bag, marked.astype(kind))
    table(tmp_path, ["id", "label"], [[f"item{i}", i % 2] for i in range(ITEMS)])
    assert_marked(tmp_path, marks(bags))


@pytest.mark.parametrize("suffix", [".npy", *SUFFIXES])
def test_in_a_folder_beside(folder: Path, bags: list[np.ndarray], suffix: str) -> None:
    (folder / "token_labels").mkdir()
    for i, marked in enumerate(marks(bags)):
        # items without any stand for items whose tokens nobody labelled
        if marked.any():
            save_alone(folder / "token_labels" / f"item{i}{suffix}", marked)
    assert_marked(folder, marks(bags))


def test_in_a_folder_with_subfolders(tmp_path: Path, same: list[np.ndarray]) -> None:
    for i, (bag, marked) in enumerate(zip(same, marks(same), strict=True)):
        for root, values in ((tmp_path, bag), (tmp_path / "token_labels", marked)):
            (root / f"ward{i % 2}").mkdir(parents=True, exist_ok=True)
            np.save(root / f"ward{i % 2}" / f"item{i // 2}.npy", values)
    table(tmp_path, ["id", "label"], [[f"ward{i % 2}/item{i // 2}", i % 2] for i in range(ITEMS)])
    assert_marked(tmp_path, marks(same))


def test_folder_without_labels_of_tokens(folder: Path) -> None:
    assert read(folder).token_labels is None
    assert "token labels" not in describe(read(folder))


def test_they_are_described(folder: Path, bags: list[np.ndarray]) -> None:
    (folder / "token_labels").mkdir()
    np.save(folder / "token_labels" / "item1.npy", np.array([0, 2, 0, 1]))
    np.save(folder / "token_labels" / "item3.npy", np.arange(len(bags[3])) == 2)
    assert "token labels: 3 tokens matter, in 2 of 30 items" in describe(read(folder))


def as_rows(bags: list[np.ndarray], labels: object) -> pa.Table:
    names = [f"item{i}" for i in range(ITEMS)]
    columns = {"id": names, "states": [bag.tolist() for bag in bags], "finding": [i % 2 for i in range(ITEMS)]}
    return pa.table({**columns, "token_labels": labels})


@pytest.mark.parametrize("kind", [pa.list_(pa.bool_()), pa.list_(pa.int8()), pa.large_list(pa.int64())])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_in_a_column_of_lists(tmp_path: Path, bags: list[np.ndarray], suffix: str, kind: pa.DataType) -> None:
    cells = [None if not m.any() else m.astype(int).tolist() for m in marks(bags)]
    of_kind = [c if c is None or kind.value_type != pa.bool_() else [bool(n) for n in c] for c in cells]
    made = as_rows(bags, pa.array(of_kind, kind))
    if suffix == ".parquet":
        pq.write_table(made, tmp_path / "data.parquet", row_group_size=7)
    else:
        with pa.ipc.new_file(str(tmp_path / "data.arrow"), made.schema) as file:
            file.write_table(made, max_chunksize=7)
    # the only other column is the label: labels of tokens are never taken for it
    assert_marked(tmp_path / f"data{suffix}", marks(bags))


def test_a_table_keeps_them_when_labels_come_from_elsewhere(tmp_path: Path, bags: list[np.ndarray]) -> None:
    pq.write_table(as_rows(bags, [m.astype(int).tolist() for m in marks(bags)]), tmp_path / "data.parquet")
    labels = table(tmp_path, ["id", "label"], [[f"item{i}", "ab"[i % 2]] for i in reversed(range(ITEMS))])
    data = read(tmp_path / "data.parquet", labels=labels)
    assert data.classes == ("a", "b")
    assert data.token_labels is not None
    assert data.token_labels.tolist() == np.concatenate(marks(bags)).astype(int).tolist()


def test_in_a_column_of_labels_csv(folder: Path, bags: list[np.ndarray]) -> None:
    cells = [";".join(map(str, m.astype(int))) if m.any() else "" for m in marks(bags)]
    table(folder, ["id", "finding", "token_labels"], [[f"item{i}", i % 2, cells[i]] for i in range(ITEMS)])
    assert_marked(folder, marks(bags))


def test_of_a_dataset_of_graphs(tmp_path: Path) -> None:
    geometric = pytest.importorskip("torch_geometric")
    edges = torch.tensor([[0, 1], [1, 2]])
    graphs = [
        geometric.data.Data(x=torch.randn(3, 2), edge_index=edges, y=torch.tensor([i % 2]))
        for i in range(ITEMS)
    ]  # fmt: skip
    for i, graph in enumerate(graphs):
        graph.token_labels = torch.tensor([0, i % 2, 0])
    torch.save(graphs, tmp_path / "graphs.pt")
    data = read(tmp_path / "graphs.pt")
    assert data.token_labels is not None
    assert data.token_labels.view(ITEMS, 3)[:, 1].tolist() == [i % 2 for i in range(ITEMS)]
    graphs[4].token_labels = torch.tensor([1])
    torch.save(graphs, tmp_path / "graphs.pt")
    with pytest.raises(InputError, match=r"item '4'.* has 1 entries, but the item has 3 tokens"):
        read(tmp_path / "graphs.pt")


def _too_short(folder: Path, bags: list[np.ndarray]) -> None:
    np.save(folder / "token_labels" / "item1.npy", np.ones(len(bags[1]) - 1, int))


def _floats(folder: Path, bags: list[np.ndarray]) -> None:
    np.save(folder / "token_labels" / "item1.npy", np.ones(len(bags[1])))


def _of_nobody(folder: Path, _: list[np.ndarray]) -> None:
    np.save(folder / "token_labels" / "itme1.npy", np.ones(3, int))


def _other_kind(folder: Path, _: list[np.ndarray]) -> None:
    (folder / "token_labels" / "item1.txt").write_text("0 1 0")


def _objects(folder: Path, bags: list[np.ndarray]) -> None:
    np.save(folder / "token_labels" / "item1.npy", np.array([0] * len(bags[1]), dtype=object))


def _several(folder: Path, bags: list[np.ndarray]) -> None:
    np.savez(folder / "token_labels" / "item1.npz", a=np.zeros(len(bags[1]), int), b=np.zeros(len(bags[1]), int))


def _twice(folder: Path, bags: list[np.ndarray]) -> None:
    np.save(folder / "token_labels" / "item1.npy", np.zeros(len(bags[1]), int))
    torch.save(torch.zeros(len(bags[1]), dtype=torch.int64), folder / "token_labels" / "item1.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_too_short, r"item 'item1' \(token_labels/item1.npy\): token_labels has 3 entries, but the item has 4 tokens"),
        (_floats, r"item 'item1' .* holds float64 of shape \[4\]; expected a whole number per token, of shape \[4\]"),
        (_of_nobody, r"file 'token_labels/itme1.npy' has the name of no item"),
        (_other_kind, r"file 'token_labels/item1.txt' is none of .npy"),
        (_objects, r"file 'token_labels/item1.npy' is not a whole .npy array"),
        (_several, r"file 'token_labels/item1.npz' holds several arrays, a, b; keep one, or call it token_labels"),
        (_twice, r"item 'item1' .* are given a second time"),
    ],
)
def test_what_does_not_fit_is_told(
    folder: Path, bags: list[np.ndarray], damage: Callable[[Path, list[np.ndarray]], None], message: str
) -> None:
    (folder / "token_labels").mkdir()
    damage(folder, bags)
    with pytest.raises(InputError, match=message):
        read(folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_own_files_with_the_wrong_count_are_told(tmp_path: Path, bags: list[np.ndarray], suffix: str) -> None:
    for i, bag in enumerate(bags):
        save_with(tmp_path / f"item{i}{suffix}", bag, np.zeros(len(bag) + (i == 5), int))
    table(tmp_path, ["id", "label"], [[f"item{i}", i % 2] for i in range(ITEMS)])
    with pytest.raises(InputError, match=rf"'item5' \(item5{suffix}\): token_labels has 9 entries, but the item has 8"):
        read(tmp_path)


def test_columns_that_do_not_fit_are_told(tmp_path: Path, bags: list[np.ndarray], folder: Path) -> None:
    cells = [m.astype(int).tolist() for m in marks(bags)]
    pq.write_table(as_rows(bags, [[], *cells[1:]]), tmp_path / "data.parquet")
    with pytest.raises(InputError, match=r"item 'item0' \(column token_labels\).* has 0 entries, .* has 3 tokens"):
        read(tmp_path / "data.parquet")
    pq.write_table(as_rows(bags, [[0.5] * len(c) for c in cells]), tmp_path / "data.parquet")
    with pytest.raises(InputError, match=r"column token_labels is list<.*double>; expected a list of whole numbers"):
        read(tmp_path / "data.parquet")
    table(folder, ["id", "label", "token_labels"], [[f"item{i}", i % 2, "1;x;0"] for i in range(ITEMS)])
    with pytest.raises(InputError, match=r"item 'item0' \(column token_labels\): token_labels holds"):
        read(folder)
