"""Extraction into a store: what is kept, in which form, and what is refused."""

import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests import tiny

from cenote.core import InputError
from cenote.features import TokenDataset, read
from cenote.features.raw import RawItems, UnreadableError, open_raw
from cenote.features.store import StoredLayers, read_manifest
from cenote.jobs.extract import ModelSpec, Options, Progress, estimate, extract

from .conftest import Photos, content


def stored(path: Path, **options: object) -> TokenDataset:
    data = read(path, **options)  # type: ignore[arg-type]
    assert isinstance(data.x, StoredLayers)
    return data


def texts(folder: Path, lines: list[str], labels: list[str]) -> RawItems:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{text}\t{label}" for text, label in zip(lines, labels, strict=True)]
    (folder / "texts.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    return open_raw(folder / "texts.tsv")


def test_images(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    backbone = vit.load()
    out = tmp_path / "store"
    told: list[Progress] = []
    options = Options(dtype="float32", batch=3, items_per_shard=8)
    done = extract(items, vit, out, options, backbone=backbone, on_progress=told.append)
    assert (done.computed, done.kept, done.manifest.shard_count) == (3, 0, 3)
    assert [told[0].done, told[-1].done, told[-1].items] == [3, 20, 20]
    assert told[-1].left == 0
    data = stored(out)
    assert (data.prefix_tokens, data.grid, data.tokens, data.dim) == (1, (4, 4), 17, 32)
    assert data.classes == ("cat", "dog")
    assert data.ids == tuple(item.id for item in items.items)
    everything = backbone([item.read().content for item in items.items]).layers[3]
    assert torch.allclose(data.batch(torch.arange(20))[0], everything, atol=1e-5)
    some = torch.tensor([19, 0, 7, 8, 0])
    x, mask = data.batch(some)
    assert mask is None
    assert torch.equal(x, data.batch(torch.arange(20))[0][some])
    assert torch.equal(data.item(8), x[3])


def test_labels_of_stored_tokens(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    """In a folder of the store, by the items' names with or without their extension."""
    extract(items, vit, tmp_path / "store", Options())
    assert stored(tmp_path / "store").token_labels is None
    marked = np.arange(17) == 5
    for name in ("cat/001.npy", "dog/002.png.npy"):
        file = tmp_path / "store" / "token_labels" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, marked)
    data = stored(tmp_path / "store")
    assert data.token_labels is not None
    assert data.token_labels.shape == (20, 17)
    assert data.token_labels.nonzero().tolist() == [
        [data.ids.index("cat/001.png"), 5],
        [data.ids.index("dog/002.png"), 5],
    ]
    np.save(file, marked[1:])
    with pytest.raises(InputError, match=r"'dog/002.png' .* has 16 entries, but the item has 17 tokens"):
        stored(tmp_path / "store")


def test_pictures_in_cells_of_a_table(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    """Images in Parquet, in several row groups, with the classes of `label` and the split of `fold`."""
    import pyarrow.parquet as pq
    from PIL import Image

    files = [tmp_path / "photos" / item.id for item in items.items]
    table = pa.table({
        "name": [f"photo {i}" for i in range(20)],
        "picture": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "animal": [file.parent.name for file in files],
        "fold": (["train"] * 6 + ["val"] * 2 + ["test"] * 2) * 2,
    })  # fmt: skip
    pq.write_table(table, tmp_path / "photos.parquet", row_group_size=6)
    raw = open_raw(tmp_path / "photos.parquet", id_column="name")
    extract(raw, vit, tmp_path / "store", Options(items_per_shard=8))
    extract(items, vit, tmp_path / "plain", Options(items_per_shard=8))
    data = stored(tmp_path / "store", label_column="animal", split_column="fold")
    assert data.classes == ("cat", "dog")
    assert data.ids[7] == "photo 7"
    assert data.indices("val").tolist() == [6, 7, 16, 17]
    plain = stored(tmp_path / "plain")
    assert all(torch.equal(data.item(i), plain.item(i)) for i in range(20))
    assert data.images is not None
    assert np.array_equal(data.images[13], np.asarray(Image.open(files[13]).resize((32, 32))))
    (tmp_path / "photos.parquet").unlink()
    gone = stored(tmp_path / "store", label_column="animal", split_column="fold")
    assert gone.images is not None
    assert gone.images[13] is None


def test_pictures_of_stored_items(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    """As the model saw them, on which its patches lie; what is gone is missing, and nothing else."""
    import base64
    import io

    from PIL import Image

    from cenote.features.store.pictures import as_seen
    from cenote.jobs.probe import Recipe, compare

    extract(items, vit, tmp_path / "store")
    data = stored(tmp_path / "store")
    assert data.images is not None
    whole = Image.open(tmp_path / "photos" / data.ids[3])
    assert whole.size == (36, 24)
    assert np.array_equal(data.images[3], np.asarray(whole.resize((32, 32))))
    first = data.ids[int(data.indices("test")[0])]
    (tmp_path / "photos" / first).unlink()
    compare(data, ["mean"], seeds=1, folds=1, recipe=Recipe(epochs=1), out=tmp_path / "out")
    shown = json.loads((tmp_path / "out" / "attention.json").read_text())["items"]
    assert [item["id"] for item in shown if item["image"] is None] == [first]
    assert Image.open(io.BytesIO(base64.b64decode(shown[1]["image"]))).size == (32, 32)

    cut = {
        "do_resize": True,
        "size": {"shortest_edge": 12},
        "do_center_crop": True,
        "crop_size": {"height": 12, "width": 12},
    }
    assert np.array_equal(np.asarray(as_seen(whole, cut)), np.asarray(whole.resize((18, 12)).crop((3, 0, 15, 12))))
    assert as_seen(whole, {**cut, "do_pad": True}) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_ragged_texts_in_every_type(tmp_path: Path, bert: ModelSpec, dtype: str) -> None:
    lines = ["a b c", "d", "e f g h i j k", "l m", "n o p q", "r s t u v w x y z"] * 2
    items = texts(tmp_path, lines, ["yes", "no"] * 6)
    options = Options(layers="all", dtype=dtype, batch=4, items_per_shard=5)  # type: ignore[arg-type]
    backbone = bert.load()
    extract(items, bert, tmp_path / "store", options, backbone=backbone)
    data = stored(tmp_path / "store", layers="1,3")
    assert data.lengths().tolist() == [len(line.split()) + 2 for line in lines]
    assert (data.tokens, data.layers, data.dtype) == (None, (1, 3), getattr(torch, dtype))
    for i, line in enumerate(lines):
        expected = backbone([line], layers=[1, 3]).layers
        for at, layer in enumerate((1, 3)):
            close = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-5}[dtype]
            assert torch.allclose(data.item(i)[at].float(), expected[layer][0], atol=close, rtol=close)
    x, mask = data.batch(torch.tensor([2, 1]))
    assert x.shape == (2, 2, 9, 32)
    assert mask is not None
    assert mask.sum(1).tolist() == [9, 3]
    assert not x[1, :, 3:].any()
    memory = data.at(3).in_memory()
    chosen = torch.tensor([5, 0, 11])
    for ours, theirs in zip(data.at(3).batch(chosen), memory.batch(chosen), strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_other_tools_can_read_it(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    """As the documentation shows: plain Arrow, a column per layer."""
    extract(items, vit, tmp_path / "store", Options(layers="2,3", items_per_shard=16))
    file = sorted((tmp_path / "store" / "shards").glob("*.arrow"))[0]
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    assert table.column_names == ["id", "input", "layer_02", "layer_03"]
    assert table.schema.field("layer_03").type == pa.large_list(pa.list_(pa.float16(), 32))
    first = np.array(table["layer_03"][0].as_py(), dtype=np.float16)
    assert np.array_equal(first, stored(tmp_path / "store").item(0).numpy())
    assert read(file, vector_column="layer_03", labelled=False).x.shape == (16, 17, 32)


def test_the_same_call_again_computes_nothing(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    out = tmp_path / "store"
    extract(items, vit, out, Options(items_per_shard=8))
    before = content(out)
    again = extract(items, vit, out)
    assert (again.computed, again.kept) == (0, 3)
    assert content(out) == before


def test_two_stores_of_the_same_are_the_same(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    for name in "ab":
        extract(items, vit, tmp_path / name, Options(items_per_shard=8))
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("pool", ["mean", "max", "cls"])
def test_pooled_while_extracting(tmp_path: Path, items: RawItems, vit: ModelSpec, pool: str) -> None:
    extract(items, vit, tmp_path / "all", Options(dtype="float32"))
    extract(items, vit, tmp_path / "pooled", Options(dtype="float32", pool=pool))
    x = stored(tmp_path / "all").batch(torch.arange(20))[0]
    expected = {"mean": x[:, 1:].mean(1), "max": x[:, 1:].amax(1), "cls": x[:, 0]}[pool]
    data = stored(tmp_path / "pooled")
    assert (data.tokens, data.prefix_tokens, data.grid) == (1, 0, None)
    assert torch.allclose(data.batch(torch.arange(20))[0][:, 0], expected, atol=1e-6)


def test_pools_that_must_be_trained_cannot_pool_while_extracting(
    tmp_path: Path, items: RawItems, vit: ModelSpec
) -> None:
    with pytest.raises(InputError, match="abmil has weights that must be trained first"):
        extract(items, vit, tmp_path / "store", Options(pool="abmil"))


def test_numbers_beyond_the_type_are_told(tmp_path: Path, bert: ModelSpec) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    import shutil

    shutil.copytree(bert.name, folder)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.2.output.LayerNorm.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    items = texts(tmp_path, ["a b"], ["x"])
    with pytest.raises(InputError, match=r"item '0': its tokens hold NaN, or numbers beyond the range of float16"):
        extract(items, ModelSpec(str(folder)), tmp_path / "store")


def test_sounds_beside_others_keep_their_tokens(tmp_path: Path) -> None:
    """A model without a mask never sees padding: every sound as if it were alone."""
    from scipy.io import wavfile
    from tests import tiny

    spec = ModelSpec(str(tiny.wav2vec2(tmp_path / "model")))
    (tmp_path / "sounds").mkdir()
    rng = np.random.RandomState(0)
    for i, count in enumerate((2000, 3000, 2000, 2500)):
        wavfile.write(tmp_path / "sounds" / f"{i}.wav", 8000, (rng.randn(count) * 3000).astype(np.int16))
    items = open_raw(tmp_path / "sounds")
    backbone = spec.load()
    extract(items, spec, tmp_path / "store", Options(dtype="float32"), backbone=backbone)
    data = stored(tmp_path / "store", labelled=False)
    for i, item in enumerate(items.items):
        assert torch.allclose(data.item(i), backbone([item.read().content]).layers[2][0], atol=1e-5)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_two_batches_at_once_give_the_store_of_one_after_the_other(
    kind: str, tmp_path: Path, items: RawItems, vit: ModelSpec, bert: ModelSpec
) -> None:
    """With two threads each computes batches of its own; which one computed what cannot be told from the store."""
    lines = [" ".join(["one two three four five six"] * (1 + i % 4)) for i in range(40)]
    raw, model = (items, vit) if kind == "image" else (texts(tmp_path / "t", lines, ["a", "b"] * 20), bert)
    options = Options(layers="all", batch=2, items_per_shard=16)
    with threads(1):
        extract(raw, model, tmp_path / "one", options)
    with threads(2):
        extract(raw, model, tmp_path / "two", options)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 2
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_what_one_of_two_threads_cannot_do_is_told(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    backbone: Any = vit.load()
    twin = backbone.twin()
    assert {p.data_ptr() for p in twin.model.parameters()} == {p.data_ptr() for p in backbone.model.parameters()}
    assert twin.model is not backbone.model

    asked = Event()
    states = backbone.states

    def refuses(*_: object) -> None:
        asked.set()
        raise InputError("one of two")

    def waits(*arguments: object) -> object:
        asked.wait(60)
        return states(*arguments)

    twin.states, backbone.states = refuses, waits
    backbone.twin = lambda: twin
    with threads(2), pytest.raises(InputError, match="one of two"):
        extract(items, vit, tmp_path / "store", Options(batch=1, items_per_shard=20), backbone=backbone)
    assert not list((tmp_path / "store" / "shards").glob("*"))
    extract(items, vit, tmp_path / "store", Options(batch=1, items_per_shard=20))


def test_estimate(tmp_path: Path, photos: Photos, vit: ModelSpec) -> None:
    items = open_raw(photos(70))
    found = estimate(items, vit, tmp_path / "store", Options(layers="all"))
    assert (found.items, found.tokens, found.bytes) == (70, 70 * 17, 70 * 17 * 4 * 32 * 2)
    assert found.sampled == 64
    assert found.seconds > 0
    assert not (tmp_path / "store").exists()


def test_labels_can_change_without_extracting_again(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    extract(items, vit, tmp_path / "store")
    relabelled = replace(items, columns={"label": ["even" if i % 4 < 2 else "odd" for i in range(20)]})
    assert extract(relabelled, vit, tmp_path / "store").computed == 0
    assert read(tmp_path / "store").classes == ("even", "odd")
    csv = tmp_path / "labels.csv"
    csv.write_text("\n".join(["id,label", *(f"{item.id},{i % 2}" for i, item in enumerate(items.items))]))
    assert read(tmp_path / "store", labels=csv).classes == ("0", "1")


def test_texts_that_were_cut_are_counted(tmp_path: Path, bert: ModelSpec) -> None:
    items = texts(tmp_path, ["a b c d e f", "a"], ["x", "y"])
    done = extract(items, replace(bert, max_length=4), tmp_path / "store")
    assert [s.shortened for s in done.manifest.shards or ()] == [1]


def test_what_does_not_fit_is_refused(tmp_path: Path, items: RawItems, vit: ModelSpec, bert: ModelSpec) -> None:
    out = tmp_path / "store"
    with pytest.raises(InputError, match="takes text, but the data are image"):
        extract(items, bert, out)
    with pytest.raises(InputError, match="layers: there is no layer 7"):
        extract(items, vit, out, Options(layers=7))
    with pytest.raises(InputError, match="dtype: expected 'float16', "):
        extract(items, vit, out, Options(dtype="int8"))  # type: ignore[arg-type]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is no feature store and not empty"):
        extract(items, vit, tmp_path / "mine")
    assert not out.exists()


def test_layers_of_a_store(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    extract(items, vit, tmp_path / "store", Options(layers="1-3"))
    assert stored(tmp_path / "store").layers == (3,)
    assert stored(tmp_path / "store", layers="-2:").layers == (2, 3)
    data = stored(tmp_path / "store", layers="all")
    assert data.batch(torch.tensor([0, 1]))[0].shape == (2, 3, 17, 32)
    assert torch.equal(data.at(-1).item(4), data.item(4)[2])
    with pytest.raises(InputError, match="there is no layer 0; there are 1, 2, 3"):
        stored(tmp_path / "store", layers=0)


def test_another_process_maps_the_same_files(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    extract(items, vit, tmp_path / "store", Options(layers="2-3"))
    data = stored(tmp_path / "store", layers="all").at(2)
    sent = pickle.dumps(data)
    assert len(sent) < data.nbytes() / 2
    there = pickle.loads(sent)
    assert there.fingerprint() == data.fingerprint()
    assert torch.equal(there.batch(torch.arange(len(data)))[0], data.batch(torch.arange(len(data)))[0])


def test_manifest_tells_what_it_is(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    extract(items, vit, tmp_path / "store", Options(items_per_shard=8))
    manifest = read_manifest(tmp_path / "store")
    assert manifest.preprocessing["size"] == {"height": 32, "width": 32}
    assert manifest.model["model_class"] == "ViTModel"
    assert [s.rows for s in manifest.shards or ()] == [8, 8, 4]
    file = tmp_path / "store" / "manifest.json"
    changed = {**json.loads(file.read_text()), "dim": 64}
    file.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="was changed after it was written"):
        read_manifest(tmp_path / "store")


WORDS = ["the good film", "a bad film xyz", "good good", "the film", "bad", "a film"] * 3


@pytest.mark.parametrize("form", ["csv", "without a header", "jsonl", "parquet", "txt"])
def test_words_of_stored_texts(form: str, tmp_path: Path, bert: ModelSpec) -> None:
    import pyarrow.parquet as pq

    suffix = "csv" if form == "without a header" else form
    file = tmp_path / f"texts.{suffix}"
    rows = list(zip(WORDS, ["x", "y"] * 9, strict=True))
    lines = [f"{label},{text}" for text, label in rows]
    if form == "csv":
        file.write_text("\n".join(["label,text", *lines]))
    elif form == "without a header":
        file.write_text("\n".join(lines))
    elif form == "jsonl":
        file.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    elif form == "parquet":
        pq.write_table(pa.table({"text": WORDS, "label": [label for _, label in rows]}), file, row_group_size=4)
    else:
        file.write_text("\n".join(WORDS))
    names = ["label", "text"] if form == "without a header" else None
    extract(open_raw(file, names=names), bert, tmp_path / "store", Options(items_per_shard=8))
    data = read(tmp_path / "store", labelled=False)
    assert data.words[1][1:-1] == (" a", " bad", " film", " xyz")
    assert data.words[3][0] == " [CLS]"
    assert [len(data.words[i]) for i in range(18)] == data.lengths().tolist()
    # another text in the place of the one that was extracted
    if form == "jsonl":
        file.write_text(file.read_text().replace("good good", "good bad"))
        with pytest.raises(UnreadableError, match=r"another text stands at .*texts.jsonl#text/2 now"):
            data.words[2]
        assert data.words[3][1:-1] == (" the", " film")


def test_words_that_cannot_be_told(tmp_path: Path) -> None:
    from cenote.jobs.probe import Recipe, compare
    from cenote.models import words

    model = ModelSpec(str(tiny.bert(tmp_path / "bert")))
    extract(texts(tmp_path, WORDS, ["x", "y"] * 9), model, tmp_path / "store")

    def shown() -> list[dict[str, object]]:
        compare(stored(tmp_path / "store"), "abmil", seeds=1, folds=1, recipe=Recipe(epochs=1), out=tmp_path / "out")
        found: list[dict[str, object]] = json.loads((tmp_path / "out" / "attention.json").read_text())["items"]
        return found

    words._tokenizer.cache_clear()
    known = shown()
    assert all(len(item["words"]) == item["tokens"] for item in known)  # type: ignore[arg-type]
    config = tmp_path / "bert" / "config.json"
    before = config.read_text()
    words._tokenizer.cache_clear()
    config.write_text(before.replace("{", '{"note": 1,', 1))
    assert all("are not those that the tokens were made with" in str(item["unread"]) for item in shown())
    config.write_text(before)
    words._tokenizer.cache_clear()
    (tmp_path / "bert").rename(tmp_path / "moved")
    assert all("there is no folder" in str(item["unread"]) for item in shown())
    (tmp_path / "moved").rename(tmp_path / "bert")
    (tmp_path / "texts.tsv").unlink()
    assert all("cannot be read" in str(item["unread"]) for item in shown())
