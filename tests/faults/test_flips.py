"""Bytes flipped in every kind of file that cenote writes and reads again: refused in a line, or nothing has changed.

What is read after a flip is compared with what was read before. A file from before there were digests is told by a warning,
and so is one in which the name of the digest was hit.
"""

import dataclasses
import json
import random
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.jobs.probe.conftest import make_dataset

import cenote
from cenote.bridges.sentence_transformers import CenotePooling
from cenote.compare.cells import Cell, load_cell, save_cell
from cenote.core import InputError
from cenote.core.files import UncheckedWarning
from cenote.explain.base import Attribution
from cenote.features.raw import RawItems
from cenote.features.raw.tables import TextItem
from cenote.features.store import Manifest, Rows, StoredTokens, read_listing, write_listing, write_shard
from cenote.features.store.pages import Collected, Pages
from cenote.jobs.extract.run import write_times
from cenote.jobs.probe import Comparison, Recipe, compare
from cenote.pool.sequence.attentive_mimicking.letter_ngrams import LetterNgrams
from cenote.pool.sequence.attentive_mimicking.mimic import Mimic
from cenote.pool.sequence.attentive_mimicking.model import AttentiveMimicking
from cenote.pool.sequence.attentive_mimicking.word_vectors import WordVectors
from cenote.report.attention import Attention


class Kept(NamedTuple):
    """A kind of file, where it lies, and how what it says is read: as something that can be compared."""

    file: str
    read: Callable[[Path], Any]


def told(value: Any) -> Any:
    """Anything as text that tells every bit of it."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, told(getattr(value, f.name))) for f in dataclasses.fields(value)]
    if isinstance(value, torch.nn.Module):
        return told(dict(value.state_dict()))
    if isinstance(value, dict):
        return sorted((str(k), told(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return [told(v) for v in value]
    return repr(value)


def store(folder: Path) -> Any:
    stored = StoredTokens(folder)
    layers = [[stored.item(i, layer) for i in range(len(stored))] for layer in stored.manifest.layers]
    return stored.manifest, stored.ids, stored.inputs, layers


def comparison(folder: Path) -> Comparison:
    """As the report does, which tells what it says it raises in a line."""
    try:
        return Comparison.load(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from error


def times(folder: Path) -> Any:
    write_times(folder, 0, 0.0)
    return [run["items"] for run in json.loads((folder / "times.json").read_text())["runs"][:-1]]


def mimic(folder: Path) -> Any:
    found = Mimic.load(folder)
    return found.model, found.ngrams.ngrams, found.known.words, found.known.vectors, found.losses


def pooling(folder: Path) -> Any:
    found = CenotePooling.load(str(folder))
    return found.method, found.dim, found.layers, found.include_prompt, found.prefix_tokens, found.settings, found.pool


KEPT = [
    Kept("run/cells/mean.safetensors", lambda out: load_cell(out / "run/cells/mean.safetensors", "key")),
    Kept("run/best/probe.json", lambda out: cenote.load(out / "run/best")),
    Kept("run/best/probe.safetensors", lambda out: cenote.load(out / "run/best")),
    Kept("run/comparison.json", lambda out: comparison(out / "run")),
    Kept("run/attention.json", lambda out: Attention.load(out / "run")),
    Kept("run/attention.safetensors", lambda out: Attention.load(out / "run")),
    Kept("store/manifest.json", lambda out: store(out / "store")),
    Kept("store/items.parquet", lambda out: read_listing(out / "store")),
    Kept("store/shards/0", lambda out: store(out / "store")),
    Kept("store/times.json", lambda out: times(out / "store")),
    Kept("pooling/config.json", lambda out: pooling(out / "pooling")),
    Kept("pooling/model.safetensors", lambda out: pooling(out / "pooling")),
    Kept("mimic/mimic.json", lambda out: mimic(out / "mimic")),
    Kept("mimic/mimic.safetensors", lambda out: mimic(out / "mimic")),
    Kept("attribution.safetensors", lambda out: Attribution.load(out / "attribution.safetensors")),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each."""
    out = tmp_path_factory.mktemp("written")
    compare(make_dataset(60), ["mean", "simpool"], seeds=1, folds=1, recipe=Recipe(epochs=1), out=out / "run")
    save_cell(out / "run/cells/mean.safetensors", "key", Cell("mean", {"seconds": 1.0}, {"scores": torch.rand(1, 3)}))
    make_store(out / "store")
    write_times(out / "store", 3, 1.0)
    (out / "pooling").mkdir()
    CenotePooling("simpool", dim=4).save(str(out / "pooling"))
    known = WordVectors(["ab", "bc"], torch.rand(2, 3))
    ngrams = LetterNgrams(["ab", "bc"], 2, 2)
    Mimic(AttentiveMimicking(3, len(ngrams)), ngrams, known).save(out / "mimic")
    Attribution(torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)).save(out / "attribution.safetensors")
    return out


def make_store(folder: Path, items: int = 5, items_per_shard: int = 2) -> None:
    """A store of random tokens of texts, as an extraction leaves it."""
    texts = [TextItem(f"item {i}", f"text {i}", folder / "texts.txt", "text", i) for i in range(items)]
    raw = RawItems("text", "texts", texts, {"label": [str(i % 2) for i in range(items)]}, used=frozenset())
    model = {"name": "a model", "weights_sha256": "0" * 64, "config_sha256": "1" * 64}
    manifest = Manifest(
        "text", model, {}, (0, 1), 4, "float16", 0, None, None, items, raw.sha256(), items_per_shard, 2, {}
    )
    rng, entries = torch.Generator().manual_seed(0), []
    for number in range(manifest.shard_count):
        chosen = texts[number * items_per_shard : (number + 1) * items_per_shard]
        tokens = Collected(Pages(4, torch.float16), manifest.layers)
        lengths = [3 + number] * len(chosen)
        begin = tokens.reserve(sum(lengths))
        for layer in manifest.layers:
            list(tokens.put(layer, begin, (torch.rand(n, 4, generator=rng) for n in lengths)))
        starts = [begin + i * lengths[0] for i in range(len(chosen))]
        rows = Rows([t.id for t in chosen], [t.read().digest for t in chosen], starts, lengths, tokens)
        entries.append(write_shard(folder, number, manifest.key(), rows, "float16"))
    manifest.finished(tuple(entries)).write(folder)
    write_listing(folder, raw)


def place(out: Path, kept: Kept) -> Path:
    if kept.file.endswith("shards/0"):
        return sorted((out / "store/shards").glob("part-*"))[0]
    return out / kept.file


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.file)
@pytest.mark.parametrize("flips", [12, pytest.param(500, marks=pytest.mark.slow("500 flips in each kind of file"))])
def test_a_flipped_byte_is_refused_or_changes_nothing(kept: Kept, flips: int, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "out")
    out, rng = tmp_path / "out", random.Random(0)
    file = place(out, kept)
    whole = file.read_bytes()
    before = told(kept.read(out))
    refused, said = 0, []
    for flip in range(flips):
        at = rng.randrange(len(whole))
        # half of them one bit, half of them any byte
        damaged = whole[at] ^ (1 << rng.randrange(8)) if flip % 2 else rng.randrange(256)
        file.write_bytes(whole[:at] + bytes([damaged]) + whole[at + 1 :])
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always", UncheckedWarning)
            try:
                found = kept.read(out)
            except InputError as error:
                said.append(str(error))
                refused += 1
                continue
        if found is None or found == []:
            # a cell, or the times of earlier runs: not believed
            refused += 1
            continue
        assert told(found) == before, f"byte {at}: {whole[at]} became {damaged}"
    assert refused > 0
    assert not [text for text in said if "\n" in text]
    file.write_bytes(whole)
    assert told(kept.read(out)) == before


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.file)
def test_a_cut_file_is_refused(kept: Kept, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "out")
    file = place(tmp_path / "out", kept)
    whole = file.read_bytes()
    for length in (0, 1, 9, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole[:length])
        found: Any = None
        with suppress(InputError):
            found = kept.read(tmp_path / "out")
        assert found in (None, [])


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_probe_of_another_run_is_refused(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "run", tmp_path / "run")
    compare(make_dataset(60, seed=1), ["mean"], seeds=1, folds=1, recipe=Recipe(epochs=1), out=tmp_path / "other")
    shutil.copy(tmp_path / "other/best/probe.json", tmp_path / "run/best/probe.json")
    with pytest.raises(InputError, match=r"it is not what probe\.json was written with"):
        cenote.load(tmp_path / "run/best")


def test_weights_that_are_no_numbers_are_refused(written: Path, tmp_path: Path) -> None:
    import cenote.core.files as files

    shutil.copytree(written / "run/best", tmp_path / "best")
    card, weights = tmp_path / "best/probe.json", tmp_path / "best/probe.safetensors"
    found = files.read_tensors(weights).tensors
    name = next(iter(found))
    files.write_saved(card, weights, json.loads(card.read_text()), {**found, name: found[name] * torch.nan})
    with pytest.raises(InputError, match="holds NaN or infinite numbers"):
        cenote.load(tmp_path / "best")


@pytest.mark.parametrize("name", ["comparison.json", "attention.json", "best/probe.json"])
def test_what_was_written_before_there_were_digests_is_read_and_told(name: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in ("sha256", "tensors_sha256")}))
    readers = {"comparison.json": Comparison.load, "attention.json": Attention.load}
    with pytest.warns(UncheckedWarning, match="was written before cenote kept digests"):
        assert readers.get(name, lambda out: cenote.load(out / "best"))(tmp_path / "run") is not None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda shards: shards[:-1], "it names 2 of 3 shards"),
        (lambda shards: [shards[1], shards[0], *shards[2:]], "it calls part-000001"),
        (lambda shards: [{**shards[0], "rows": 1}, *shards[1:]], r"shard 0 has 1 \+ 0 items, expected 2"),
        (lambda shards: [{**shards[0], "tokens": shards[0]["tokens"] + 1}, *shards[1:]], "its items do not fill it"),
    ],
    ids=["last entry gone", "numbers exchanged", "rows changed", "tokens changed"],
)
def test_a_manifest_is_compared_with_its_shards(damage: Any, said: str, written: Path, tmp_path: Path) -> None:
    """Also one that was made to carry the right digest."""
    from cenote.core.files import sealed

    shutil.copytree(written / "store", tmp_path / "store")
    path = tmp_path / "store/manifest.json"
    raw = json.loads(path.read_text())
    change(path, shards=damage(raw["shards"]))
    with pytest.raises(InputError, match="it was changed after it was written"):
        StoredTokens(tmp_path / "store")
    path.write_text(json.dumps(sealed(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=said):
        _ = StoredTokens(tmp_path / "store").lengths


def test_a_shard_under_the_number_of_another_is_refused(written: Path, tmp_path: Path) -> None:
    from cenote.core.files import sealed

    shutil.copytree(written / "store", tmp_path / "store")
    path = tmp_path / "store/manifest.json"
    raw = json.loads(path.read_text())
    first, second = raw["shards"][:2]
    names = [f"part-{i:06d}-{s['sha256'][:16]}.arrow" for i, s in enumerate((second, first))]
    for shard, name in zip((second, first), names, strict=True):
        (tmp_path / "store/shards" / shard["file"]).rename(tmp_path / "store/shards" / name)
    shards = [{**second, "file": names[0]}, {**first, "file": names[1]}, *raw["shards"][2:]]
    path.write_text(json.dumps(sealed({**raw, "shards": shards})))
    with pytest.raises(InputError, match="is no shard 0"):
        _ = StoredTokens(tmp_path / "store").ids
