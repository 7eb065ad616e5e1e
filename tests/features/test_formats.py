"""Every format that `read` takes gives the same tokens back."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from cenote.core import Bags, InputError
from cenote.features import TokenDataset, describe, digits, read

from .conftest import DIM, ITEMS, table


def assert_holds(data: TokenDataset, expected: list[np.ndarray], dtype: torch.dtype = torch.float32) -> None:
    assert len(data) == len(expected)
    assert data.dtype == dtype
    for i, bag in enumerate(expected):
        torch.testing.assert_close(data.item(i), torch.from_numpy(np.ascontiguousarray(bag)).to(dtype), rtol=0, atol=0)


def save_item(path: Path, bag: np.ndarray) -> None:
    match path.suffix:
        case ".npy":
            np.save(path, bag)
        case ".npz":
            np.savez_compressed(path, features=bag, coords=np.zeros((len(bag), 2), np.int64))
        case ".safetensors":
            save_file({"x": torch.from_numpy(bag), "coords": torch.zeros(len(bag), 2, dtype=torch.int32)}, path)
        case ".h5":
            import h5py

            with h5py.File(path, "w") as file:
                file["features"], file["coords"] = bag, np.zeros((len(bag), 2), np.int64)
        case ".pt":
            torch.save(torch.from_numpy(bag), path)
        case ".pth":
            torch.save({"features": torch.from_numpy(bag), "slide": "a name"}, path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".h5", ".pt", ".pth"])
def test_folder_of_files(tmp_path: Path, bags: list[np.ndarray], suffix: str) -> None:
    for i, bag in enumerate(bags):
        save_item(tmp_path / f"item{i}{suffix}", bag)
    table(tmp_path, ["id", "label"], [[f"item{i}", i % 3] for i in range(ITEMS)])
    data = read(tmp_path)
    assert isinstance(data.x, Bags)
    assert_holds(data, bags)
    assert data.task == "multiclass"
    assert data.classes == ("0", "1", "2")
    assert data.y.tolist() == [i % 3 for i in range(ITEMS)]
    assert suffix in data.source


def test_same_lengths_are_dense_and_not_copied(folder: Path, same: list[np.ndarray]) -> None:
    for i, bag in enumerate(same):
        np.save(folder / f"item{i}.npy", bag)
    data = read(folder, prefix_tokens=1, grid=(1, 2))
    assert isinstance(data.x, torch.Tensor)
    assert data.x.shape == (ITEMS, 3, DIM)
    assert (data.grid, data.prefix_tokens, data.tokens) == ((1, 2), 1, 3)
    assert_holds(data, same)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4", ">f8"])
def test_number_types(folder: Path, bags: list[np.ndarray], kind: str) -> None:
    for i, bag in enumerate(bags):
        np.save(folder / f"item{i}.npy", bag.astype(kind))
    kept = torch.float16 if kind == "f2" else torch.float32
    assert_holds(read(folder), bags, kept)


def test_mixed_types_become_float32(folder: Path, bags: list[np.ndarray]) -> None:
    np.save(folder / "item3.npy", bags[3].astype(np.float16))
    data = read(folder)
    assert data.dtype == torch.float32
    np.testing.assert_array_equal(data.item(3).numpy(), bags[3].astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(data.item(4).numpy(), bags[4])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_bfloat16_is_kept(tmp_path: Path, bags: list[np.ndarray], suffix: str) -> None:
    for i, bag in enumerate(bags):
        x = torch.from_numpy(bag).bfloat16()
        path = tmp_path / f"item{i}{suffix}"
        save_file({"x": x}, path) if suffix == ".safetensors" else torch.save(x, path)
    table(tmp_path, ["id", "label"], [[f"item{i}", i % 2] for i in range(ITEMS)])
    assert_holds(read(tmp_path), bags, torch.bfloat16)


def test_fortran_order(folder: Path, bags: list[np.ndarray]) -> None:
    for i, bag in enumerate(bags):
        np.save(folder / f"item{i}.npy", np.asfortranarray(bag))
    assert_holds(read(folder), bags)


def test_old_torch_files(folder: Path, bags: list[np.ndarray]) -> None:
    for i, bag in enumerate(bags):
        (folder / f"item{i}.npy").unlink()
        torch.save(torch.from_numpy(bag), folder / f"item{i}.pt", _use_new_zipfile_serialization=False)
    assert_holds(read(folder), bags)


def test_array_by_name(tmp_path: Path, bags: list[np.ndarray]) -> None:
    for i, bag in enumerate(bags):
        np.savez(tmp_path / f"item{i}.npz", early=bag * 2, late=bag)
    table(tmp_path, ["id", "label"], [[f"item{i}", i % 2] for i in range(ITEMS)])
    with pytest.raises(InputError, match=r"item0.npz.*several arrays, early, late.*vector_column"):
        read(tmp_path)
    assert_holds(read(tmp_path, vector_column="late"), bags)


def test_files_in_subfolders_and_ways_to_write_ids(tmp_path: Path, bags: list[np.ndarray]) -> None:
    ids = []
    for i, bag in enumerate(bags):
        (tmp_path / f"part{i % 2}").mkdir(exist_ok=True)
        np.save(tmp_path / f"part{i % 2}" / f"item.{i}.npy", bag)
        ids.append((f"part{i % 2}/item.{i}.npy", f"part{i % 2}/item.{i}", f"item.{i}.npy", f"item.{i}")[i % 4])
    (tmp_path / ".cache").mkdir()
    np.save(tmp_path / ".cache" / "hidden.npy", bags[0])
    table(tmp_path, ["id", "label"], [[name, i % 2] for i, name in enumerate(ids)])
    data = read(tmp_path)
    assert_holds(data, bags)
    assert data.ids == tuple(ids)


def test_a_path_wins_over_a_bare_name(tmp_path: Path, bags: list[np.ndarray]) -> None:
    (tmp_path / "sub").mkdir()
    for i, bag in enumerate(bags):
        np.save(tmp_path / f"{i}.npy", bag)
    np.save(tmp_path / "sub" / "0.npy", bags[0] + 1)
    table(tmp_path, ["id", "label"], [*([i, i % 2] for i in range(ITEMS)), ["sub/0", 0]])
    assert_holds(read(tmp_path), [*bags, bags[0] + 1])


def test_labels_elsewhere_with_other_column_names(folder: Path, bags: list[np.ndarray], tmp_path: Path) -> None:
    (folder / "labels.csv").unlink()
    other = tmp_path / "clinical.tsv"
    lines = [
        "\ufeffslide\toutcome\tpatient\tfold",
        *(f"item{i}\t{'yes' if i % 2 else 'no'}\tp{i // 2}\t{('train', 'test')[i // 2 % 2]}" for i in range(ITEMS)),
    ]
    other.write_text("\n".join(lines), "utf-8")
    data = read(
        folder,
        labels=other,
        id_column="slide",
        label_column="outcome",
        group_column="patient",
        split_column="fold",
    )
    assert_holds(data, bags)
    assert data.classes == ("no", "yes")
    assert data.groups is not None
    assert data.groups[5] == "p2"
    assert (data.split == 2).nonzero().flatten().tolist() == [i for i in range(ITEMS) if i // 2 % 2]
    assert (data.split == 1).any()


def test_unlabelled_folder(folder: Path, bags: list[np.ndarray]) -> None:
    (folder / "labels.csv").unlink()
    data = read(folder, labelled=False)
    order = sorted(range(ITEMS), key=lambda i: f"item{i}.npy")
    assert data.ids == tuple(f"item{i}" for i in order)
    assert_holds(data, [bags[i] for i in order])
    assert data.classes == ()
    assert (data.split == 2).all()
    assert "not labelled" in describe(data)


def test_unlabelled_items_of_one_name_keep_their_extension(folder: Path, bags: list[np.ndarray]) -> None:
    np.savez(folder / "item3.npz", bags[3])
    assert {"item3.npy", "item3.npz"} <= set(read(folder, labelled=False).ids)


def arrow_table(bags: list[np.ndarray], kind: pa.DataType, **columns: object) -> pa.Table:
    vectors = pa.array([bag.tolist() for bag in bags], pa.list_(pa.list_(kind)))
    return pa.table({"tokens": vectors, **columns})


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow", ".ipc"])
def test_arrow_files(tmp_path: Path, bags: list[np.ndarray], suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    made = arrow_table(
        bags, pa.float32(), id=[f"n{i}" for i in range(ITEMS)], label=["xy"[i % 2] for i in range(ITEMS)]
    )
    if suffix == ".parquet":
        pa.parquet.write_table(made, path, row_group_size=7)
    elif suffix == ".feather":
        pa.feather.write_feather(made, path, compression="lz4", chunksize=7)
    else:
        opened = pa.ipc.new_file if suffix == ".arrow" else pa.ipc.new_stream
        with opened(str(path), made.schema) as writer:
            writer.write_table(made, max_chunksize=7)
    data = read(path)
    assert_holds(data, bags)
    assert data.ids[7] == "n7"
    assert data.classes == ("x", "y")
    assert data.y.tolist() == [i % 2 for i in range(ITEMS)]


@pytest.mark.parametrize(
    ("kind", "kept"), [(pa.float16(), torch.float16), (pa.float32(), torch.float32), (pa.float64(), torch.float32)]
)
def test_arrow_number_types(tmp_path: Path, bags: list[np.ndarray], kind: pa.DataType, kept: torch.dtype) -> None:
    made = arrow_table([b.astype(np.float16) for b in bags], kind, label=[i % 2 for i in range(ITEMS)])
    pa.feather.write_feather(made, tmp_path / "data.feather")
    assert_holds(read(tmp_path / "data.feather"), [b.astype(np.float16) for b in bags], kept)


@pytest.mark.parametrize("outer", ["list", "large", "fixed"])
def test_arrow_list_types(tmp_path: Path, same: list[np.ndarray], outer: str) -> None:
    inner = pa.list_(pa.float32(), DIM)
    kind = {"list": pa.list_(inner), "large": pa.large_list(pa.large_list(pa.float32())), "fixed": pa.list_(inner, 3)}[
        outer
    ]
    made = pa.table({"v": pa.array([b.tolist() for b in same], kind), "label": [i % 2 for i in range(ITEMS)]})
    pa.feather.write_feather(made, tmp_path / "data.feather")
    data = read(tmp_path / "data.feather")
    assert isinstance(data.x, torch.Tensor)
    assert_holds(data, same)


def test_arrow_slices_are_read_from_their_offset(tmp_path: Path, bags: list[np.ndarray]) -> None:
    made = arrow_table([bags[0], *bags], pa.float32(), label=[i % 2 for i in range(ITEMS + 1)]).slice(1)
    with pa.ipc.new_file(str(tmp_path / "data.arrow"), made.schema) as writer:
        writer.write_table(made)
    assert_holds(read(tmp_path / "data.arrow"), bags)


def test_arrow_other_columns(tmp_path: Path, bags: list[np.ndarray]) -> None:
    made = arrow_table(
        bags,
        pa.float32(),
        picture=[b"bytes"] * ITEMS,
        first=[i * 0.5 for i in range(ITEMS)],
        who=pa.array([f"p{i // 3}" for i in range(ITEMS)]).dictionary_encode(),
    )
    pa.parquet.write_table(made, tmp_path / "data.pq")
    data = read(tmp_path / "data.pq", label_column="first", group_column="who", vector_column="tokens")
    assert data.task == "regression"
    assert data.y.flatten().tolist() == [i * 0.5 for i in range(ITEMS)]
    assert data.groups == tuple(f"p{i // 3}" for i in range(ITEMS))


def save_as_datasets_does(folder: Path, made: pa.Table) -> None:
    folder.mkdir(parents=True)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "tokens": {"_type": "Array2D"}}
    made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    halves = [made.slice(0, len(made) // 2), made.slice(len(made) // 2)]
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, half in zip(names, halves, strict=True):
        with pa.ipc.new_stream(str(folder / name), half.schema) as writer:
            writer.write_table(half)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_dataset(tmp_path: Path, bags: list[np.ndarray]) -> None:
    save_as_datasets_does(tmp_path / "set", arrow_table(bags, pa.float32(), label=[i % 2 for i in range(ITEMS)]))
    data = read(tmp_path / "set")
    assert_holds(data, bags)
    assert data.classes == ("cat", "dog")
    assert data.ids[-1] == str(ITEMS - 1)


def test_saved_dataset_with_splits(tmp_path: Path, bags: list[np.ndarray]) -> None:
    root = tmp_path / "set"
    for name, part in (("train", slice(0, 16)), ("validation", slice(16, 22)), ("test", slice(22, 30))):
        made = arrow_table(bags[part], pa.float32(), label=[i % 2 for i in range(ITEMS)][part])
        save_as_datasets_does(root / name, made)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    data = read(root)
    assert_holds(data, bags)
    assert data.split.tolist() == [0] * 16 + [1] * 6 + [2] * 8


def test_the_datasets_package_itself(tmp_path: Path, bags: list[np.ndarray]) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"tokens": [b.tolist() for b in bags], "label": [i % 2 for i in range(ITEMS)]})
    made.save_to_disk(tmp_path / "set")
    assert_holds(read(tmp_path / "set"), bags)


def test_folder_of_parquet_files_named_by_split(tmp_path: Path, bags: list[np.ndarray]) -> None:
    for name, part in (("train-00000-of-00001", slice(0, 20)), ("test-00000-of-00001", slice(20, 30))):
        made = arrow_table(bags[part], pa.float32(), label=[i % 2 for i in range(ITEMS)][part])
        pa.parquet.write_table(made, tmp_path / f"{name}.parquet")
    data = read(tmp_path)
    assert_holds(data, [*bags[20:], *bags[:20]])
    assert data.split.bincount().tolist() == [15, 5, 10]
    assert (data.split[:10] == 2).all()


def test_npz_dense(tmp_path: Path, same: list[np.ndarray]) -> None:
    path = tmp_path / "data.npz"
    np.savez(
        path,
        x=np.stack(same),
        y=np.arange(ITEMS) % 2,
        ids=np.array([f"n{i}" for i in range(ITEMS)]),
        groups=np.arange(ITEMS) // 2,
        split=np.array([("train", "val", "test")[i // 2 % 3] for i in range(ITEMS)]),
    )
    data = read(path)
    assert isinstance(data.x, torch.Tensor)
    assert_holds(data, same)
    assert data.ids[3] == "n3"
    assert data.split.tolist() == [i // 2 % 3 for i in range(ITEMS)]
    assert data.groups is not None
    assert data.groups[29] == "14"


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_padded_becomes_bags(tmp_path: Path, bags: list[np.ndarray], compressed: bool) -> None:
    x = np.full((ITEMS, 9, DIM), np.nan, np.float32)
    mask = np.zeros((ITEMS, 9), bool)
    for i, bag in enumerate(bags):
        x[i, : len(bag)], mask[i, : len(bag)] = bag, True
    (np.savez_compressed if compressed else np.savez)(tmp_path / "data.npz", x=x, y=np.arange(ITEMS) % 2, mask=mask)
    data = read(tmp_path / "data.npz")
    assert isinstance(data.x, Bags)
    assert_holds(data, bags)


def test_npz_mask_that_hides_nothing_gives_dense(tmp_path: Path, same: list[np.ndarray]) -> None:
    mask = np.ones((ITEMS, 3), np.uint8)
    np.savez(tmp_path / "data.npz", x=np.stack(same).astype(">f8"), y=np.arange(ITEMS) % 2, mask=mask)
    data = read(tmp_path / "data.npz")
    assert isinstance(data.x, torch.Tensor)
    assert_holds(data, same)


def test_npz_ragged_with_offsets(tmp_path: Path, bags: list[np.ndarray]) -> None:
    offsets = np.cumsum([0, *map(len, bags)])
    np.savez(tmp_path / "data.npz", x=np.concatenate(bags), offsets=offsets, y=np.arange(ITEMS) % 2)
    assert_holds(read(tmp_path / "data.npz"), bags)


@pytest.mark.parametrize("ragged", [False, True])
def test_npz_of_several_layers(tmp_path: Path, ragged: bool) -> None:
    x = np.random.default_rng(0).normal(size=(ITEMS, 3, 4, DIM)).astype(np.float32)
    mask = np.ones((ITEMS, 4), bool)
    lengths = [2 + i % 3 for i in range(ITEMS)] if ragged else [4] * ITEMS
    for i, n in enumerate(lengths):
        mask[i, n:], x[i, :, n:] = False, np.nan
    np.savez(tmp_path / "data.npz", x=x, mask=mask, y=np.arange(ITEMS) % 2)
    data = read(tmp_path / "data.npz", layers="all")
    assert (data.layers, data.dim, data.tokens) == ((1, 2, 3), DIM, None if ragged else 4)
    for i, n in enumerate(lengths):
        np.testing.assert_array_equal(data.item(i), x[i, :, :n])
    # without being asked for, the last layer alone, as of a feature store
    assert_holds(read(tmp_path / "data.npz"), [x[i, -1, :n] for i, n in enumerate(lengths)])
    assert_holds(read(tmp_path / "data.npz", layers=2), [x[i, 1, :n] for i, n in enumerate(lengths)])
    some = read(tmp_path / "data.npz", layers="-2:")
    assert some.layers == (2, 3)
    np.testing.assert_array_equal(some.item(5), x[5, 1:, : lengths[5]])


def test_npz_says_which_layers_it_holds(tmp_path: Path) -> None:
    path, y = tmp_path / "data.npz", np.arange(ITEMS) % 2
    x = np.random.default_rng(0).normal(size=(ITEMS, 3, 4, DIM)).astype(np.float32)
    np.savez(path, x=x, y=y, layers=np.array([0, 6, 12]))
    data = read(path, layers="all", prefix_tokens=1)
    assert (data.layers, data.prefix_tokens) == ((0, 6, 12), 1)
    for wrong in ([0, 6], [6, 0, 12], [0.5, 1, 2], [-1, 0, 1]):
        np.savez(path, x=x, y=y, layers=np.array(wrong))
        with pytest.raises(InputError, match="layers must hold the 3 rising numbers"):
            read(path, layers="all")
    np.savez(path, x=x, y=y)
    with pytest.raises(InputError, match="no layer 4"):
        read(path, layers=4)
    x[7, 0, 2, 1] = np.inf
    np.savez(path, x=x, y=y)
    with pytest.raises(InputError, match=r"item '7' holds NaN"):
        read(path, layers="all")


def test_npz_with_two_dimensional_y(tmp_path: Path, same: list[np.ndarray]) -> None:
    y = np.stack([np.arange(ITEMS) % 2, np.arange(ITEMS) % 3 == 0], 1).astype(np.int64)
    np.savez(tmp_path / "data.npz", x=np.stack(same), y=y, site=np.arange(ITEMS))
    data = read(tmp_path / "data.npz")
    assert data.task == "multilabel"
    assert data.y.tolist() == y.tolist()
    assert data.classes == ("y 0", "y 1")
    np.savez(tmp_path / "data.npz", x=np.stack(same), y=y + 0.25)
    data = read(tmp_path / "data.npz", label_column="y")
    assert data.task == "regression"
    assert data.y.tolist() == (y + 0.25).tolist()


def test_npz_unlabelled(tmp_path: Path, same: list[np.ndarray]) -> None:
    np.savez(tmp_path / "data.npz", x=np.stack(same))
    assert_holds(read(tmp_path / "data.npz", labelled=False), same)


def test_labels_file_beside_an_npz_is_matched_by_id(tmp_path: Path, same: list[np.ndarray]) -> None:
    np.savez(tmp_path / "data.npz", x=np.stack(same), ids=np.array([f"n{i}" for i in range(ITEMS)]))
    rows = [[f"n{i}", "ab"[i % 2]] for i in reversed(range(ITEMS))]
    data = read(tmp_path / "data.npz", labels=table(tmp_path, ["id", "label"], rows))
    assert data.y.tolist() == [i % 2 for i in range(ITEMS)]
    assert_holds(data, same)
    rows[4] = ["other", "a"]
    with pytest.raises(InputError) as told:
        read(tmp_path / "data.npz", labels=table(tmp_path, ["id", "label"], rows))
    assert "item 'n25' has no row in labels.csv" in str(told.value)
    assert "id 'other' in labels.csv is no item of the data" in str(told.value)
    assert "2 problems" in str(told.value)


def test_embedded_by_name() -> None:
    assert read("digits").fingerprint() == digits().fingerprint()
    assert read("digits", prefix_tokens=1).prefix_tokens == 1
    assert read("digit-bags").task == "binary"
    with pytest.raises(InputError, match="label_column: digits comes with its own"):
        read("digits", label_column="x")
    with pytest.raises(InputError, match="prefix_tokens: digits has 1, got 2"):
        read("digits", prefix_tokens=2)


def test_reading_twice_gives_the_same(folder: Path) -> None:
    assert read(folder).fingerprint() == read(folder).fingerprint()
    assert read(folder, seed=1).fingerprint() != read(folder).fingerprint()


@pytest.mark.parametrize("form", ["dense", "padded", "ragged"])
def test_npz_with_labels_of_tokens(tmp_path: Path, same: list[np.ndarray], bags: list[np.ndarray], form: str) -> None:
    lengths = [len(bag) for bag in (same if form == "dense" else bags)]
    marked = [np.arange(n) % 3 == 1 for n in lengths]
    y = {"y": np.arange(ITEMS) % 2}
    if form == "ragged":
        y |= {"x": np.concatenate(bags), "offsets": np.cumsum([0, *lengths]), "token_labels": np.concatenate(marked)}
    elif form == "dense":
        y |= {"x": np.stack(same), "token_labels": np.stack(marked)}
    else:
        longest = max(lengths)
        y["x"] = np.stack([np.pad(bag, ((0, longest - len(bag)), (0, 0))) for bag in bags])
        y["mask"] = np.arange(longest) < np.array(lengths)[:, None]
        # what stands at padding is not read
        y["token_labels"] = np.stack([np.pad(m, (0, longest - len(m)), constant_values=True) for m in marked])
    np.savez(tmp_path / "data.npz", **y)
    labels = read(tmp_path / "data.npz").token_labels
    assert labels is not None
    assert labels.shape == ((ITEMS, lengths[0]) if form == "dense" else (sum(lengths),))
    assert labels.flatten().tolist() == np.concatenate(marked).astype(int).tolist()


def test_npz_labels_of_tokens_must_go_with_x(tmp_path: Path, same: list[np.ndarray]) -> None:
    for wrong in (np.zeros((ITEMS, 1), int), np.zeros((ITEMS, len(same[0])))):
        np.savez(tmp_path / "data.npz", x=np.stack(same), y=np.arange(ITEMS) % 2, token_labels=wrong)
        with pytest.raises(InputError, match="token_labels must hold a whole number per token"):
            read(tmp_path / "data.npz")
