"""Everything that can be wrong is told before training, with the item and the remedy."""

import builtins
import csv
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from cenote.core import InputError, files
from cenote.features import read
from cenote.features.table import read_csv

from .conftest import DIM, ITEMS, relabel, table


def told(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **options)
    return str(caught.value)


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "there is no file or folder" in told(tmp_path / "nothing")
    assert "digits, digit-bags" in told(tmp_path / "nothing")


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a")
    assert "is none of .npz, .arrow" in told(tmp_path / "data.csv")


def test_empty_folder(tmp_path: Path) -> None:
    assert "holds no .npy" in told(tmp_path)


def test_labels_missing(folder: Path) -> None:
    (folder / "labels.csv").rename(folder / "meta.csv")
    assert "there is no labels.csv; name the file with labels=... (there is meta.csv)" in told(folder)
    (folder / "meta.csv").unlink()
    assert "add one with columns id and label" in told(folder)
    assert "there is no file" in told(folder, labels=folder / "x.csv")


def test_missing_columns_name_those_found(folder: Path) -> None:
    table(folder, ["slide", "grade", "age"], [[f"item{i}", "ab"[i % 2], i] for i in range(ITEMS)])
    assert "no column called id, item" in told(folder)
    assert "its columns are slide, grade, age" in told(folder)
    message = told(folder, id_column="slide")
    assert "no column is called label" in message
    assert "slide, grade, age" in message
    assert "there is no column 'site'; the columns are slide, grade, age" in told(
        folder, id_column="slide", label_column="grade", group_column="site"
    )
    for argument in ("label_column", "split_column", "id_column"):
        assert f"{argument}: there is no column 'nope'" in told(folder, **{"id_column": "slide", argument: "nope"})


def test_csv_that_is_not_a_table(folder: Path) -> None:
    csv = folder / "labels.csv"
    csv.write_text("id,label\nitem0,a,b\n")
    assert "line 2: 3 cells under 2 column names" in told(folder)
    csv.write_text("id,id\nitem0,a\n")
    assert "names a column twice" in told(folder)
    csv.write_text("id,label\n")
    assert "holds no item" in told(folder)
    csv.write_bytes(b"id,label\nitem0,\xff\xfe\n")
    assert "is not UTF-8 text" in told(folder)


def test_ids_without_file_and_files_without_row(folder: Path) -> None:
    (folder / "item3.npy").rename(folder / "other.npy")
    message = told(folder)
    assert "2 problems" in message
    assert "id 'item3' in labels.csv has no file in the folder; add it or take the row out" in message
    assert "file 'other.npy' has no row in labels.csv; add one or move the file elsewhere" in message


def test_id_that_may_be_several_files(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "item3.npy").rename(folder / "sub" / "item3.npy")
    np.save(folder / "item3.x.npy", np.ones((2, DIM), np.float32))
    save_file({"x": torch.ones(2, DIM)}, folder / "item3.x.safetensors")
    table(folder, ["id", "label"], [[f"item{i}" if i != 3 else "item3.x", i % 2] for i in range(ITEMS)])
    assert "id 'item3.x' may be any of item3.x.npy, item3.x.safetensors; write its path" in told(folder)


def test_duplicate_ids(folder: Path) -> None:
    table(folder, ["id", "label"], [*([f"item{i}", i % 2] for i in range(ITEMS)), ["item4", 0]])
    assert told(folder).endswith("id 'item4' stands 2 times; keep one row per item")
    table(folder, ["id", "label"], [*([f"item{i}", i % 2] for i in range(ITEMS)), ["item4.npy", 0]])
    assert "ids 'item4', 'item4.npy' mean one file, item4.npy" in told(folder)
    table(folder, ["id", "label"], [["" if i == 4 else f"item{i}", i % 2] for i in range(ITEMS)])
    assert "1 rows have no id" in told(folder)


def test_no_label(folder: Path) -> None:
    relabel(folder, lambda i: "" if i == 6 else "ab"[i % 2])
    assert told(folder).endswith("item 'item6' has no label; give it one or leave the item out")


def test_widths_that_differ(folder: Path) -> None:
    np.save(folder / "item7.npy", np.ones((4, 5), np.float32))
    assert "item 'item7' has vectors of width 5, but 29 of 30 items have 8" in told(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(folder: Path, bags: list[np.ndarray], bad: float) -> None:
    bags[7][2, 3] = bad
    np.save(folder / "item7.npy", bags[7])
    assert "item 'item7' (item7.npy) holds NaN or infinite numbers, first in row 2" in told(folder)


def test_doubles_beyond_float32(folder: Path) -> None:
    np.save(folder / "item7.npy", np.full((3, DIM), 1e300))
    assert "item 'item7' (item7.npy) holds NaN or infinite numbers" in told(folder)


def test_empty_bags(folder: Path) -> None:
    np.save(folder / "item7.npy", np.ones((0, DIM), np.float32))
    assert "item 'item7' (item7.npy) has no tokens; leave it out" in told(folder)
    for i in range(ITEMS):
        np.save(folder / f"item{i}.npy", np.ones((0, DIM), np.float32))
    assert "30 problems" in told(folder)


@pytest.mark.parametrize("shape", [(DIM,), (1, 3, DIM), ()])
def test_shapes_that_are_no_bag(folder: Path, shape: tuple[int, ...]) -> None:
    np.save(folder / "item7.npy", np.ones(shape, np.float32))
    assert f"item 'item7' (item7.npy) has shape {list(shape)}; expected [tokens, dim]" in told(folder)


@pytest.mark.parametrize("kind", ["i8", "u1", "c8", "U3", "?"])
def test_wrong_number_types(folder: Path, kind: str) -> None:
    np.save(folder / "item7.npy", np.ones((3, DIM)).astype(kind))
    assert "item 'item7' (item7.npy) holds " in told(folder)
    assert "expected float16, float32 or float64: use array.astype('float32')" in told(folder)


def trap(folder: Path) -> Any:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "executed",))

    return Trap()


def test_object_arrays_are_refused_and_not_run(folder: Path) -> None:
    np.save(folder / "item7.npy", np.array([trap(folder)], object), allow_pickle=True)
    assert "item 'item7' (item7.npy) holds Python objects, which would need unpickling" in told(folder)
    (folder / "item7.npy").unlink()
    np.savez(folder / "item7.npz", features=np.array([trap(folder)], object))
    assert "item 'item7' (item7.npz) holds Python objects, which would need unpickling" in told(folder)
    assert not (folder / "executed").exists()


def test_pt_that_needs_unpickling_is_refused_and_not_run(folder: Path) -> None:
    (folder / "item7.npy").unlink()
    torch.save({"features": torch.ones(3, DIM), "extra": trap(folder)}, folder / "item7.pt")
    assert "item 'item7' (item7.pt) holds Python objects that would need unpickling, which may run code" in told(folder)
    (folder / "item7.pt").write_bytes(pickle.dumps(trap(folder), protocol=2))
    assert "item 'item7' (item7.pt)" in told(folder)
    assert not (folder / "executed").exists()


def test_pt_without_a_fitting_tensor(folder: Path) -> None:
    (folder / "item7.npy").unlink()
    torch.save([torch.ones(3, DIM)], folder / "item7.pt")
    assert "(item7.pt) holds a list; expected a tensor or a dict of tensors" in told(folder)
    torch.save(torch.ones(3, DIM).int(), folder / "item7.pt")
    assert "(item7.pt) holds torch.int32; expected float16" in told(folder)
    torch.save({"coords": torch.ones(3, 2).int()}, folder / "item7.pt")
    assert "(item7.pt) holds no array of floats, only coords" in told(folder)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".h5", ".pt"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.9])
def test_truncated_files(folder: Path, suffix: str, kept: float) -> None:
    from .test_formats import save_item

    (folder / "item7.npy").unlink()
    path = folder / f"item7{suffix}"
    save_item(path, np.random.RandomState(0).randn(500, DIM).astype(np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    message = told(folder)
    assert f"item 'item7' (item7{suffix})" in message
    assert "write it again" in message
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".h5", ".pt"])
def test_garbage(folder: Path, suffix: str) -> None:
    (folder / "item7.npy").unlink()
    (folder / f"item7{suffix}").write_bytes(np.random.RandomState(0).bytes(5000))
    assert f"item 'item7' (item7{suffix})" in told(folder)


def test_damaged_inside_a_compressed_file(folder: Path) -> None:
    (folder / "item7.npy").unlink()
    path = folder / "item7.npz"
    np.savez_compressed(path, x=np.random.RandomState(0).randn(500, DIM).astype(np.float32))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    assert "item 'item7' (item7.npz) is damaged" in told(folder)


def test_npz_header_that_lies(folder: Path) -> None:
    import io
    import zipfile

    (folder / "item7.npy").unlink()
    raw = io.BytesIO()
    np.save(raw, np.ones((3, DIM), np.float32))
    with zipfile.ZipFile(folder / "item7.npz", "w") as archive:
        archive.writestr("x.npy", raw.getvalue().replace(b"(3, 8), }" + b" " * 9, b"(9999999999, 8), }"))
    assert "item 'item7' (item7.npz) is truncated: 224 of " in told(folder)


def test_safetensors_header_that_lies(folder: Path) -> None:
    (folder / "item7.npy").unlink()
    for entry in (
        '{"dtype":"F32","shape":[9,8],"data_offsets":[0,96]}',
        '{"shape":[3,8]}',
        '{"dtype":"F32","shape":"x"}',
        "3",
    ):
        head = f'{{"x":{entry}}}'.encode()
        (folder / "item7.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(96))
        assert "item 'item7' (item7.safetensors) has " in told(folder)


def test_array_name_that_is_not_there(folder: Path) -> None:
    (folder / "item7.npy").unlink()
    np.savez(folder / "item7.npz", a=np.ones((3, DIM), np.float32), n=np.ones(3, int))
    assert "has no array 'b'; it holds a, n" in told(folder, vector_column="b")
    assert "array 'n' does not hold floats" in told(folder, vector_column="n")
    np.savez(folder / "item7.npz")
    assert "(item7.npz) holds no array" in told(folder)


def test_h5py_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "item7.npy").rename(folder / "item7.h5")
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "h5py":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "item 'item7' (item7.h5) needs h5py; install it with: pip install 'cenote[hdf5]'" in told(folder)


def test_one_class_only(folder: Path) -> None:
    relabel(folder, lambda i: "a")
    assert "holds one class only, a; a probe needs at least two" in told(folder)


def test_class_too_small_is_named(folder: Path) -> None:
    relabel(folder, lambda i: "rare" if i < 2 else "ab"[i % 2])
    assert "class 'rare' has 2 items, and each of train, val and test needs one; add items" in told(folder)


def test_class_in_too_few_groups(folder: Path) -> None:
    rows = [[f"item{i}", "rare" if i < 8 else "ab"[i % 2], f"g{i // 4}"] for i in range(ITEMS)]
    table(folder, ["id", "label", "group"], rows)
    assert "class 'rare' has 2 groups, and each of train, val and test needs one; add groups" in told(folder)


def test_group_on_two_sides_is_named(folder: Path) -> None:
    rows = [[f"item{i}", "ab"[i % 2], f"g{i // 3}", ("train", "val", "test")[i // 6 % 3]] for i in range(ITEMS)]
    rows[4][3] = "test"
    table(folder, ["id", "label", "group", "split"], rows)
    message = told(folder)
    assert message.endswith(
        "group 'g1' stands in train and test (item3, item4, item5); move it to one of them, or leave the split out to have "
        "whole groups split"
    )


def test_item_without_group(folder: Path) -> None:
    table(
        folder, ["id", "label", "group"], [[f"item{i}", "ab"[i % 2], "" if i == 3 else f"g{i}"] for i in range(ITEMS)]
    )
    assert "item 'item3' has no group; give it one of its own" in told(folder)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            lambda i: "holdout" if i == 3 else ("train", "val", "test")[i // 2 % 3],
            "item 'item3' has split 'holdout'; expected",
        ),
        (lambda i: "train", "no item is in the test split"),
        (lambda i: "test", "no item is in the train split"),
        (lambda i: "test" if i % 2 else "train", "class 'b' is in test but not in train"),
        (lambda i: "train" if i < 20 else ("val", "test")[i % 2], "class 'b' has no item in the val split"),
    ],
)
def test_splits_that_cannot_work(folder: Path, split: Any, message: str) -> None:
    table(folder, ["id", "label", "split"], [[f"item{i}", "ab"[i % 2], split(i)] for i in range(ITEMS)])
    assert message in told(folder)


def test_prefix_and_grid_that_do_not_fit(folder: Path) -> None:
    assert "item 'item0' has 3 tokens, all of them prefix (prefix_tokens=3)" in told(folder, prefix_tokens=3)
    assert "grid 2 x 2 with prefix_tokens=0 means 4 tokens per item, but items have 3, 5, 6, 7, 8 and 1 more" in told(
        folder, grid=(2, 2)
    )
    assert "prefix_tokens: expected 0 or more" in told(folder, prefix_tokens=-1)
    assert "grid: expected (height, width)" in told(folder, grid=(0, 3))


def test_fractions_and_task_that_are_none(folder: Path) -> None:
    for wrong in (
        (0.8, 0.2, 0.0),
        (0.5, 0.5),
        0.5,
        None,
        "abc",
        ("a", "b", "c"),
        (0.5, None, 0.5),
        (float("nan"),) * 3,
    ):
        assert "fractions: expected three positive shares" in told(folder, fractions=wrong)
    assert "task: expected 'binary', 'multiclass', 'multilabel' or 'regression', got 'ranking'" in told(
        folder, task="ranking"
    )


def test_all_problems_are_told_and_kinds_take_turns(folder: Path, bags: list[np.ndarray]) -> None:
    rows = [[f"item{i}", "" if i == 2 else "ab"[i % 2]] for i in range(ITEMS)] + [[f"gone{i}", "a"] for i in range(50)]
    table(folder, ["id", "label"], rows)
    np.save(folder / "item5.npy", np.ones((2, 3), np.float32))
    bags[6][0, 0] = np.nan
    np.save(folder / "item6.npy", bags[6])
    (folder / "item7.npy").write_bytes(b"")
    message = told(folder)
    lines = message.splitlines()
    assert "54 problems" in lines[0]
    assert len(lines) == 12
    assert lines[-1].strip() == "... and 44 more"
    for piece in ("'gone0'", "'item2' has no label", "'item5' has vectors of width 3", "'item6'", "'item7'"):
        assert piece in message


def arrow(path: Path, bags: list[Any], **columns: object) -> Path:
    made = pa.table({"v": pa.array(bags, pa.list_(pa.list_(pa.float32()))), **columns})
    pa.parquet.write_table(made, path)
    return path


def test_arrow_item_problems(tmp_path: Path, bags: list[np.ndarray]) -> None:
    cells: list[Any] = [bag.tolist() for bag in bags]
    cells[3], cells[4], cells[5], cells[6][1], cells[7] = [], None, [[1.0] * 5], [float("nan")] * DIM, [[None] * DIM]
    cells[8][1] = None
    message = told(arrow(tmp_path / "d.parquet", cells, label=[i % 2 for i in range(ITEMS)]))
    assert "6 problems" in message
    for piece in (
        "item '3' has no tokens",
        "item '4' has no tokens",
        "item '5' has vectors of width 5, but the first item's have 8",
        "item '6' holds NaN, infinite or missing numbers",
        "item '7' holds NaN",
        "item '8' has vectors of width 0",
    ):
        assert piece in message


def test_arrow_column_problems(tmp_path: Path, same: list[np.ndarray]) -> None:
    path = tmp_path / "d.feather"
    vectors = pa.array([b.tolist() for b in same])
    pa.feather.write_feather(
        pa.table({"a": vectors, "b": vectors, "flat": [[1.0]] * ITEMS, "label": [0, 1] * 15}), path
    )
    assert "has several columns (a, b) of lists of vectors" in told(path)
    assert "'flat' of" in told(path, vector_column="flat")
    assert "no column 'c'; its columns are a (list<" in told(path, vector_column="c")
    assert "there is no column 'nope'; the columns are flat, label" in told(path, vector_column="a", id_column="nope")
    pa.feather.write_feather(pa.table({"v": pa.array([[[1, 2]]] * ITEMS), "label": [0, 1] * 15}), path)
    assert "has no column of lists of vectors" in told(path)
    assert "list<element: int64>" in told(path) or "int64" in told(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_damaged_arrow_files(tmp_path: Path, same: list[np.ndarray], suffix: str, kept: float) -> None:
    path = tmp_path / f"d{suffix}"
    made = pa.table({"v": pa.array([b.tolist() for b in same]), "label": [0, 1] * 15})
    pa.parquet.write_table(made, path) if suffix == ".parquet" else pa.feather.write_feather(made, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    assert "file (" in told(path)
    assert "write it again" in told(path)


def test_saved_dataset_problems(tmp_path: Path, same: list[np.ndarray]) -> None:
    (tmp_path / "state.json").write_text("{oops")
    assert "is not JSON" in told(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../data.arrow"}]}')
    assert "data.arrow" in told(tmp_path)
    (tmp_path / "state.json").unlink()
    arrow(tmp_path / "a.parquet", [b.tolist() for b in same], label=[0, 1] * 15)
    arrow(tmp_path / "b.parquet", [b.tolist() for b in same], other=[0, 1] * 15)
    assert "its columns v, other differ from those of a.parquet, v, label" in told(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.ones((6, 2, 3), "f4")}, "holds no array called x; it holds y, z"),
        ({"x": np.ones((6, 3), "f4")}, "x has shape [6, 3]; expected [items, tokens, dim]"),
        ({"x": np.ones((6, 2, 3), "i8")}, "holds int64; expected float16"),
        ({"x": np.ones((6, 2, 3), "f4"), "mask": np.ones((6, 3), bool)}, "mask has shape [6, 3]; expected [6, 2]"),
        ({"x": np.ones((6, 2, 3), "f4"), "mask": np.full((6, 2), 7)}, "mask holds other numbers than 0 and 1"),
        ({"x": np.ones((6, 3), "f4"), "offsets": np.array([0, 4, 3, 6])}, "offsets must be items + 1 whole numbers"),
        ({"x": np.ones((6, 3), "f4"), "offsets": np.array([0, 4, 7])}, "offsets must be items + 1 whole numbers"),
        ({"x": np.ones((0, 2, 3), "f4"), "y": np.ones(0)}, "holds no item"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "d.npz", **{"y": np.arange(6) % 2, **arrays})
    assert message in told(tmp_path / "d.npz")


def test_npz_with_objects(tmp_path: Path) -> None:
    ragged = np.empty(6, object)
    ragged[:] = [np.ones((i + 1, 3)) for i in range(6)]
    np.savez(tmp_path / "d.npz", x=ragged, y=np.arange(6) % 2)
    assert "would need unpickling; save a plain array of floats (items of different lengths: one file each" in told(
        tmp_path / "d.npz"
    )
    np.savez(tmp_path / "d.npz", x=np.ones((6, 2, 3)), y=np.array(list("ababab"), object))
    assert "array 'y' cannot be read" in told(tmp_path / "d.npz")


def test_npz_item_problems(tmp_path: Path) -> None:
    x = np.ones((12, 2, 3), np.float32)
    x[4, 1, 0] = np.nan
    mask = np.ones((12, 2), bool)
    mask[7] = False
    np.savez(tmp_path / "d.npz", x=x, mask=mask, y=np.arange(12) % 2, groups=np.arange(11))
    message = told(tmp_path / "d.npz")
    assert "item '4' holds NaN" in message
    assert "array 'groups' has shape [11], but there are 12 items" in message
    np.savez(tmp_path / "d.npz", x=np.ones((12, 2, 3)), mask=mask, y=np.arange(12) % 2)
    assert told(tmp_path / "d.npz").endswith("item '7' has no tokens; leave it out")
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[:200])
    assert "is not a whole .npz archive" in told(tmp_path / "d.npz")


def test_tables_are_read_in_threads_and_the_limit_of_csv_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,label\n" + "".join(f'{i},"{"x" * 200_000}"\n' for i in range(5)))
    before = csv.field_size_limit()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(read_csv, [path] * 16))
    assert all(columns == found[0] for columns in found)
    assert csv.field_size_limit() == before


def test_what_cenote_wrote_among_the_data_is_not_data(folder: Path, bags: list[np.ndarray]) -> None:
    results, store = folder / "cenote-out", folder / "deeper" / "store"
    for output in (results / "cells", results / "best", store / "shards"):
        output.mkdir(parents=True)
    np.save(results / "cells" / "mean.npy", bags[0])
    np.save(store / "shards" / "0.npy", bags[0])
    with files.alone(results, "comparison"):
        (store / "manifest.json").write_text("{}")
    assert len(read(folder)) == len(bags)
    (store / "manifest.json").unlink()
    assert "has no row in labels.csv" in told(folder)


def test_tokens_of_width_0(tmp_path: Path) -> None:
    labels = ["a", "b"] * 5
    np.savez(tmp_path / "x.npz", x=np.zeros((10, 4, 0), np.float32), y=labels)
    vectors = pa.array([[[]] * 4] * 10, pa.list_(pa.list_(pa.float32())))
    pyarrow.parquet.write_table(pa.table({"x": vectors, "label": labels}), tmp_path / "x.parquet")
    for name in ("x.npz", "x.parquet"):
        assert "tokens are of width 0" in told(tmp_path / name)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_names_of_columns_that_are_no_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    made = pa.table({"x": pa.array([[[1.0]]] * 4, pa.list_(pa.list_(pa.float32()))), "label": list("abab")})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(made, path)
    else:
        pyarrow.feather.write_feather(made, path, compression="uncompressed")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"label", b"lab\xff\xfel"[:5]))
    assert f"is not a whole {suffix[1:].capitalize()} file ('utf-8' codec" in told(path)
