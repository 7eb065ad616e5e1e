import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.jobs.probe.conftest import make_dataset, make_ragged

import cenote
from cenote.core import InputError
from cenote.features import TokenDataset
from cenote.jobs.probe import Recipe, compare, load

QUICK = Recipe(epochs=2, learning_rates=(1e-2,), patience=2)


def _trained(data: TokenDataset, method: str, out: Path) -> Path:
    compare(data, [method], seeds=1, recipe=QUICK, references=False, folds=1, out=out)
    return out / "best"


@pytest.mark.parametrize("data", [make_dataset(), make_ragged()], ids=["padded", "ragged"])
def test_vectors_are_what_the_pool_gives_of_each_item(data: TokenDataset, tmp_path: Path) -> None:
    best = _trained(data, "abmil", tmp_path / "out")
    saved = load(best)
    found = cenote.embed(best, data)
    assert found.ids == data.ids
    for i in (0, 7, len(data) - 1):
        torch.testing.assert_close(found.vectors[i], saved.probe.pooled(data.copies(i)).squeeze(0).detach())
    assert found.about["method"] == saved.method


def test_files_hold_ids_and_vectors(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    data = make_dataset()
    found = cenote.embed(_trained(data, "mean", tmp_path / "out"), data)
    found.write(tmp_path / "v.parquet")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table["id"].to_pylist() == list(data.ids)
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), found.vectors.numpy())
    assert json.loads(table.schema.metadata[b"cenote"])["method"] == found.about["method"]
    found.write(tmp_path / "v.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), found.vectors.numpy())
    assert json.loads((tmp_path / "v.ids.json").read_text())["ids"] == list(data.ids)
    with pytest.raises(InputError, match=r"expected a name that ends in \.parquet or \.npy"):
        found.write(tmp_path / "v.csv")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "v.ids.json", "v.npy", "v.parquet"]


def test_a_lance_table_takes_new_items_and_keeps_one_row_an_id(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    from cenote.bridges import lancedb

    data = make_dataset()
    found = cenote.embed(_trained(data, "mean", tmp_path / "out"), data)
    place = lancedb.place_of(f"{tmp_path}/lance/items")
    assert place == (tmp_path / "lance", "items")
    for _ in range(2):
        lancedb.write_table(*place, found.table())
    import lancedb as library

    table = library.connect(str(place[0])).open_table("items")
    assert table.count_rows() == len(data)
    (nearest,) = table.search(found.vectors[3].numpy()).limit(1).to_list()
    assert nearest["id"] == data.ids[3]
    with pytest.raises(InputError, match=r"the table items in .* holds .*; name another"):
        lancedb.write_table(*place, found.table().rename_columns(["id", "other"]))


def test_a_place_in_lance_is_a_folder_and_a_table() -> None:
    from cenote.bridges import lancedb

    with pytest.raises(InputError, match="expected lancedb://FOLDER/TABLE, got lancedb://items"):
        lancedb.place_of("items")
