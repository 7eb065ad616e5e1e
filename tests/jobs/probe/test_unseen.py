import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests import tiny
from tests.jobs.extract.conftest import Photos, bert, photos, vit

import cenote
from cenote.core import InputError, files
from cenote.features import read
from cenote.features.raw import open_raw
from cenote.features.rawness import is_raw
from cenote.jobs.extract import ModelSpec, Options, extract
from cenote.jobs.probe import Reading, Recipe, load, predict
from cenote.jobs.probe.raw import compare_raw
from cenote.jobs.probe.unseen import views

__all__ = ["bert", "photos", "vit"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, vit: ModelSpec) -> Path:
    """A probe of layer 2 of a tiny ViT, trained on raw images."""
    place = tmp_path_factory.mktemp("trained")
    folder = _photos(place / "photos", 30)
    compare_raw(
        open_raw(folder), vit, "mean", out=place / "out", seeds=1, recipe=Recipe(epochs=2), layers="2", references=False
    )
    return place / "out" / "best"


def _photos(folder: Path, count: int, seed: int = 0) -> Path:
    from PIL import Image

    rng = np.random.RandomState(seed)
    for i in range(count):
        (folder / ("cat" if i % 2 else "dog")).mkdir(parents=True, exist_ok=True)
        picture = rng.randint(0, 256, (24, 36, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / ("cat" if i % 2 else "dog") / f"{i:03d}.png")
    return folder


def test_raw_images_go_through_the_model_of_the_probe(trained: Path, vit: ModelSpec, tmp_path: Path) -> None:
    new = _photos(tmp_path / "new", 7, seed=1)
    saved = load(trained)
    assert saved.origin is not None
    assert (saved.origin.name, saved.origin.kind, saved.layers) == (vit.name, "image", (2,))
    found = cenote.predict(trained, new)
    # what a store of all layers says, by hand
    extract(open_raw(new), vit, tmp_path / "store", Options(layers="all"))
    by_hand = cenote.predict(trained, tmp_path / "store")
    assert [p.id for p in found] == [p.id for p in by_hand] == [i.id for i in open_raw(new).items]
    for raw, stored in zip(found, by_hand, strict=True):
        assert raw.scores == pytest.approx(stored.scores, abs=1e-5)
    assert cenote.predict(trained, open_raw(new)) == found
    # kept, and gone on with
    assert cenote.predict(trained, new, Reading(features=tmp_path / "kept")) == found
    assert read(tmp_path / "kept", labelled=False).layers == (2,)


def test_many_items_come_in_pieces_of_a_shard(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cenote.jobs.extract.plan.SHARD_BYTES", 1)
    new = _photos(tmp_path / "new", 70)
    done: list[tuple[int, int]] = []
    shown = views(load(trained), new, on_progress=lambda now: done.append((now.done, now.items)))
    assert [len(view) for view in shown] == [32, 32, 6]
    assert done[-1] == (70, 70)
    assert [n for n, _ in done] == sorted(n for n, _ in done)


def test_unreadable_items_are_all_told_before_the_model_runs_or_left_out(trained: Path, tmp_path: Path) -> None:
    new = _photos(tmp_path / "new", 6)
    for name in ("dog/000.png", "cat/005.png"):
        (new / name).write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"(?s)cat/005\.png.*dog/000\.png"):
        predict(trained, new)
    told: list[str] = []
    found = predict(trained, new, Reading(skip_bad=True), on_message=told.append)
    assert len(found) == 4
    assert sum("left out" in line for line in told) == 2


def test_a_store_of_other_layers_is_refused_with_the_remedy(trained: Path, vit: ModelSpec, tmp_path: Path) -> None:
    new = _photos(tmp_path / "new", 4)
    extract(open_raw(new), vit, tmp_path / "last")
    with pytest.raises(
        InputError, match=r"reads layer 2, and \[2\] are not there: last holds 3; .*--layers 2.*--force"
    ):
        predict(trained, tmp_path / "last")
    assert len(predict(trained, tmp_path / "last", Reading(force=True))) == 4
    extract(open_raw(new), vit, tmp_path / "two", Options(layers="1,3"))
    with pytest.raises(InputError, match=r"two holds 1, 3; .*--layers 2$"):
        predict(trained, tmp_path / "two", Reading(force=True))


def test_tokens_of_another_model_are_refused_by_name(trained: Path, vit: ModelSpec, tmp_path: Path) -> None:
    new = _photos(tmp_path / "new", 4)
    other = tiny.vit(tmp_path / "other-vit", intermediate_size=40)
    extract(open_raw(new), ModelSpec(str(other)), tmp_path / "store", Options(layers=2))
    with pytest.raises(
        InputError, match=rf"tokens of {vit.name}, and these are tokens of {other} \(.*the model's weights"
    ):
        predict(trained, tmp_path / "store")
    with pytest.raises(InputError, match="other-vit"):
        predict(trained, new, Reading(backbone=str(other)))
    assert len(predict(trained, new, Reading(backbone=str(other), force=True))) == 4
    # another width can never be forced
    wide = tiny.vit(tmp_path / "wide", hidden_size=48)
    with pytest.raises(InputError, match="width 48, but the probe takes 32"):
        predict(trained, new, Reading(backbone=str(wide), force=True))
    # numbers in fewer bits are the same tokens
    extract(open_raw(new), replace(vit, precision="bfloat16"), tmp_path / "short", Options(2, dtype="bfloat16"))
    assert len(predict(trained, tmp_path / "short")) == 4


def test_a_model_that_has_moved_is_named_again(trained: Path, vit: ModelSpec, tmp_path: Path) -> None:
    moved = tmp_path / "out" / "best"
    shutil.copytree(trained, moved)
    card = json.loads((moved / "probe.json").read_text())
    card["origin"]["model"]["name"] = str(tmp_path / "gone")
    (moved / "probe.json").write_text(json.dumps(files.sealed(card)))
    new = _photos(tmp_path / "new", 3)
    with pytest.raises(InputError, match=r"there is no folder .*gone; .*--backbone"):
        predict(moved, new)
    assert predict(moved, new, Reading(backbone=vit.name)) == predict(trained, new)


def test_a_probe_of_before_names_no_model(trained: Path, vit: ModelSpec, tmp_path: Path) -> None:
    old = tmp_path / "best"
    shutil.copytree(trained, old)
    card = json.loads((old / "probe.json").read_text())
    del card["origin"]
    (old / "probe.json").write_text(json.dumps(files.sealed(card)))
    assert load(old).origin is None
    new = _photos(tmp_path / "new", 3)
    with pytest.raises(InputError, match="name the model with --backbone"):
        predict(old, new)
    assert predict(old, new, Reading(backbone=vit.name)) == predict(trained, new)


def test_texts_are_cut_and_read_as_in_training(bert: ModelSpec, tmp_path: Path) -> None:
    table = tmp_path / "letters.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([" ".join("abcdefgh"[i % 8] * (1 + i % 5)), "ab"[i % 2]] for i in range(30))
    out = tmp_path / "out"
    spec = replace(bert, max_length=5)
    compare_raw(open_raw(table), spec, "mean", out=out, seeds=1, recipe=Recipe(epochs=2), references=False)
    (tmp_path / "new.txt").write_text("a b c d e f g h\na b c x y z\nz\n")
    first, second, third = predict(out / "best", tmp_path / "new.txt")
    # [CLS] a b c [SEP] is left of both
    assert first.scores == pytest.approx(second.scores)
    assert third.scores != pytest.approx(first.scores)
    with pytest.raises(InputError, match=r"are image, but .* takes text"):
        predict(out / "best", open_raw(_photos(tmp_path / "photos", 2)))


def test_what_means_nothing_of_such_data_is_refused(trained: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "tokens.npz", x=np.zeros((2, 3, 32), np.float32))
    with pytest.raises(InputError, match=r"device: .*tokens\.npz holds tokens already; leave device out"):
        predict(trained, tmp_path / "tokens.npz", Reading(device="cuda"))
    told: list[str] = []
    assert len(predict(trained, tmp_path / "tokens.npz", on_message=told.append)) == 2
    assert "does not say whose tokens it holds" in told[0]


def test_tokens_and_raw_data_are_told_apart(photos: Photos, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert is_raw(photos(2))
    (tmp_path / "a.tsv").write_text("text\na\n")
    assert is_raw(tmp_path / "a.tsv")
    pq.write_table(pa.table({"text": ["a"], "v": [[[1.0, 2.0]]]}), tmp_path / "vectors.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "texts.parquet")
    assert not is_raw(tmp_path / "vectors.parquet")
    assert is_raw(tmp_path / "texts.parquet")
    bags = tmp_path / "bags"
    bags.mkdir()
    np.save(bags / "a.npy", np.zeros((2, 3)))
    (bags / "labels.csv").write_text("id,label\na,1\n")
    assert not is_raw(bags)
    assert not is_raw(tmp_path / "nothing")
