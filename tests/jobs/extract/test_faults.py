"""What can go wrong between the first item and the last: found and named, or survived with the same store, byte for byte.

Each test is a line of the table in `docs/scale.md`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny

from cenote.core import InputError
from cenote.features import read
from cenote.features.raw import RawItems, open_raw
from cenote.features.store import Manifest, ShardEntry, finished_shards
from cenote.jobs.extract import Job, LocalEngine, ModelSpec, Options, Shard, extract, job

from .conftest import Photos, content

OPTIONS = Options(items_per_shard=3, batch=2)


@pytest.fixture
def reference(tmp_path: Path, items: RawItems, vit: ModelSpec) -> dict[str, bytes]:
    """The store as it is when nothing goes wrong."""
    extract(items, vit, tmp_path / "reference", OPTIONS)
    return content(tmp_path / "reference")


@pytest.fixture
def store(tmp_path: Path, items: RawItems, vit: ModelSpec) -> Path:
    """A complete store, to be damaged."""
    extract(items, vit, tmp_path / "store", OPTIONS)
    return tmp_path / "store"


def shard_file(store: Path, number: int) -> Path:
    return finished_shards(store)[number].path


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow("50 runs are killed"))])
def test_killed_at_random_moments(
    tmp_path: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes], kills: int
) -> None:
    out, room = tmp_path / "killed", tmp_path / "room"
    room.mkdir()
    program = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, program, vit.name, tmp_path / "photos", out, str(kills), "0"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(program.parents[3] / f) for f in ("src", ".")),
            "TMPDIR": str(room),
        },
    )
    assert done.returncode == 0, done.stderr
    assert list(room.iterdir()) == []
    finished = json.loads(done.stdout)
    assert len(finished) == kills
    assert any(0 < n < 7 for n in finished) or kills < 50
    assert content(out) == reference
    assert read(out).batch is not None


def test_what_a_killed_run_left_half_written_is_taken_away(
    store: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes]
) -> None:
    """A kill may also come while one of the small files is written; random moments seldom meet it."""
    for name in (
        ".manifest.json.ab12cd34.unfinished",
        ".times.json.ab12cd34.unfinished",
        ".items.parquet-77",
        "shards/.unfinished-000003-a-77",
    ):
        (store / name).write_bytes(b"half")
    assert extract(items, vit, store, OPTIONS).computed == 0
    assert content(store) == reference


def test_interrupted_in_mid_run(tmp_path: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes]) -> None:
    """Ctrl-C: what is finished stays, and is not computed again."""

    class Interrupted(LocalEngine):
        def run(self, job: Job, todo: Iterable[Shard], on_shard: object, on_items: object) -> None:
            def first_two() -> Iterator[Shard]:
                for shard in todo:
                    if shard.number == 2:
                        raise KeyboardInterrupt
                    yield shard

            super().run(job, first_two(), on_shard, on_items)  # type: ignore[arg-type]

    out = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        extract(items, vit, out, OPTIONS, engine=Interrupted())
    with pytest.raises(InputError, match="2 of 7 shards are finished; run the same cenote extract again"):
        read(out)
    done = extract(items, vit, out, OPTIONS)
    assert (done.computed, done.kept) == (5, 2)
    assert content(out) == reference


def test_truncated_shard(store: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes]) -> None:
    file = shard_file(store, 2)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"{file.name}: is damaged"):
        read(store)
    told: list[str] = []
    done = extract(items, vit, store, OPTIONS, on_message=told.append)
    assert (done.computed, done.remade) == (1, (file.name,))
    assert told == [f"{file.name} is damaged: made anew"]
    assert content(store) == reference


def test_flipped_byte(store: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes]) -> None:
    import torch

    file = shard_file(store, 1)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    damaged = read(store)
    damaged.batch(torch.tensor([0]))
    with pytest.raises(InputError, match=rf"{file.name}: is damaged \(its bytes do not match its checksum\)"):
        damaged.batch(torch.tensor([0, 4]))
    assert extract(items, vit, store, OPTIONS).remade == (file.name,)
    assert content(store) == reference


def test_lost_shard(store: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes]) -> None:
    file = shard_file(store, 3)
    file.unlink()
    with pytest.raises(InputError, match=rf"{file.name}: is lost"):
        read(store)
    told: list[str] = []
    assert extract(items, vit, store, OPTIONS, on_message=told.append).computed == 1
    assert told == [f"{file.name} is lost: made anew"]
    assert content(store) == reference


@pytest.mark.parametrize("name", ["manifest.json", "items.parquet"])
@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_lost_or_cut_manifest_and_listing(
    store: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes], name: str, damage: str
) -> None:
    file = store / name
    file.unlink() if damage == "lost" else file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match=rf"{name}|is no feature store|holds no"):
        read(store)
    told: list[str] = []
    assert extract(items, vit, store, OPTIONS, on_message=told.append).computed == 0
    assert told == (["manifest.json is damaged: written again"] if (name, damage) == ("manifest.json", "cut") else [])
    assert content(store) == reference


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes]) -> None:
    out = small_disk / "store"
    with pytest.raises(
        InputError, match=r"(shard \d of .* could not be written|cannot write to).*No space left on device"
    ):
        extract(items, vit, out, OPTIONS)
    kept = len(finished_shards(out))
    assert 0 < kept < 7
    assert not list(out.rglob(".unfinished*"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    done = extract(items, vit, out, OPTIONS)
    assert done.kept == kept
    assert content(out) == reference


def test_two_writers_at_once(tmp_path: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes]) -> None:
    out = tmp_path / "store"
    seen: list[str] = []

    class Second(LocalEngine):
        def run(self, job: Job, todo: Iterable[Shard], on_shard: object, on_items: object) -> None:
            with pytest.raises(InputError) as refused:
                extract(items, vit, out, OPTIONS)
            seen.append(str(refused.value))
            super().run(job, todo, on_shard, on_items)  # type: ignore[arg-type]

    extract(items, vit, out, OPTIONS, engine=Second())
    assert f"another cenote extract is writing to {out} (process {os.getpid()} on" in seen[0]
    assert content(out) == reference


def test_what_another_writer_finished_meanwhile_is_heeded(
    tmp_path: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the folder and its lock: the manifest that was not there is not written over."""
    out, planned, calls = tmp_path / "store", job.planned, []

    def late(*arguments: Any) -> Manifest:
        calls.append(arguments)
        if len(calls) == 1:
            extract(items, vit, out, OPTIONS)
        return planned(*arguments)

    monkeypatch.setattr(job, "planned", late)
    with pytest.raises(InputError, match="was made otherwise"):
        extract(items, vit, out, replace(OPTIONS, dtype="float32"))
    assert content(out) == reference


def test_the_same_shard_written_twice(
    store: Path, items: RawItems, vit: ModelSpec, reference: dict[str, bytes]
) -> None:
    """As when a worker was thought dead and was not: the same file under the same name."""
    from cenote.features.store import read_manifest
    from cenote.jobs.extract import Worker

    manifest = replace(read_manifest(store), shards=None)
    entries: list[ShardEntry] = [Worker(Job(store, vit, manifest))(Shard(1, items.items[3:6])) for _ in range(2)]
    assert entries[0] == entries[1]
    assert content(store) == reference


def test_corrupt_image_among_good_ones(tmp_path: Path, photos: Photos, vit: ModelSpec) -> None:
    folder = photos(12)
    (folder / "cat" / "003.png").write_bytes((folder / "cat" / "003.png").read_bytes()[:200])
    (folder / "dog" / "004.png").write_bytes(b"")
    items, out = open_raw(folder), tmp_path / "store"
    with pytest.raises(InputError) as refused:
        extract(items, vit, out, OPTIONS)
    assert "cat/003.png" in str(refused.value)
    assert "dog/004.png" in str(refused.value)
    assert "2 problems" in str(refused.value)
    assert "--skip-bad" in str(refused.value)
    assert not finished_shards(out), "the model ran before the error"
    done = extract(items, vit, out, replace(OPTIONS, skip_bad=True))
    assert [name for name, _ in done.skipped] == ["cat/003.png", "dog/004.png"]
    # why they were left out is kept in the store, in words that are the same each time
    extract(items, vit, tmp_path / "again", replace(OPTIONS, skip_bad=True))
    assert content(tmp_path / "again") == content(out)
    data = read(out)
    assert len(data) == 10
    assert {"cat/003.png", "dog/004.png"}.isdisjoint(data.ids)
    assert [data.classes[c] for c in data.y.tolist()] == [name.split("/")[0] for name in data.ids]
    with pytest.raises(InputError, match="was left out by an earlier run"):
        extract(items, vit, out, OPTIONS)


def test_corrupt_sound_among_good_ones(tmp_path: Path) -> None:
    from scipy.io import wavfile

    spec = ModelSpec(str(tiny.wav2vec2(tmp_path / "model")))
    folder = tmp_path / "sounds"
    folder.mkdir()
    for i in range(6):
        wavfile.write(folder / f"{i}.wav", 8000, (np.random.RandomState(i).randn(2000) * 3000).astype(np.int16))
    (folder / "2.wav").write_bytes((folder / "2.wav").read_bytes()[:-500])
    (folder / "4.wav").write_bytes(b"RIFF1234WAVE")
    items = open_raw(folder)
    with pytest.raises(InputError, match="2 problems") as refused:
        extract(items, spec, tmp_path / "store", OPTIONS)
    assert "'2.wav' is cut short" in str(refused.value)
    assert "'4.wav'" in str(refused.value)
    done = extract(items, spec, tmp_path / "store", replace(OPTIONS, skip_bad=True))
    assert [name for name, _ in done.skipped] == ["2.wav", "4.wav"]


def test_model_changed_between_runs(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(vit.name, folder)
    spec = ModelSpec(str(folder))
    extract(items, spec, tmp_path / "store", OPTIONS)
    before = content(tmp_path / "store")
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"was made otherwise:\n  - the model's weights: [0-9a-f]{12}... in the store"):
        extract(items, spec, tmp_path / "store", OPTIONS)
    shutil.copy(Path(vit.name) / "model.safetensors", folder)
    processor = folder / "preprocessor_config.json"
    processor.write_text(json.dumps({**json.loads(processor.read_text()), "image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(InputError, match=r"preprocessing\.image_mean: \[0\.5, 0\.5, 0\.5\] in the store"):
        extract(items, spec, tmp_path / "store", OPTIONS)
    assert content(tmp_path / "store") == before


def test_other_options_between_runs(store: Path, items: RawItems, vit: ModelSpec) -> None:
    with pytest.raises(InputError, match=r"dtype: float16 in the store, float32 now"):
        extract(items, vit, store, replace(OPTIONS, dtype="float32"))
    with pytest.raises(InputError, match=r"layers: \[3\] in the store, \[0, 1, 2, 3\] now"):
        extract(items, vit, store, replace(OPTIONS, layers="all"))


def test_input_changed_between_runs(tmp_path: Path, store: Path, vit: ModelSpec, reference: dict[str, bytes]) -> None:
    folder = tmp_path / "photos"
    first, second = folder / "cat" / "001.png", folder / "cat" / "003.png"
    good = first.read_bytes()
    # touched, but the same
    first.write_bytes(good)
    assert extract(open_raw(folder), vit, store, OPTIONS).computed == 0
    # another content of the same size: only the bytes tell
    swapped = bytearray(good)
    swapped[-1] ^= 1
    first.write_bytes(swapped)
    with pytest.raises(InputError, match=r"item 'cat/001.png' has changed since it was extracted"):
        extract(open_raw(folder), vit, store, OPTIONS)
    first.write_bytes(good)
    second.write_bytes(second.read_bytes() + b"more")
    with pytest.raises(InputError, match=r"the items: 1 changed \('cat/003.png'\)"):
        extract(open_raw(folder), vit, store, OPTIONS)
    second.unlink()
    shutil.copy(first, folder / "dog" / "new.png")
    with pytest.raises(InputError, match=r"1 gone \('cat/003.png'\), 1 new \('dog/new.png'\)"):
        extract(open_raw(folder), vit, store, OPTIONS)
    assert content(store) == reference


def test_input_is_compared_by_its_bytes_whatever_the_dates(tmp_path: Path, store: Path, vit: ModelSpec) -> None:
    """A store that was copied later, shards dated in the future, a file put back with its size and its time."""
    file = tmp_path / "photos" / "cat" / "001.png"
    data, made = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(made.st_atime_ns, made.st_mtime_ns))
    for shard in finished_shards(store).values():
        os.utime(shard.path, (2**32, 2**32))
    copied = shutil.copytree(store, tmp_path / "copied")
    for folder in (store, copied):
        with pytest.raises(InputError, match=r"item 'cat/001.png' has changed since it was extracted"):
            extract(open_raw(tmp_path / "photos"), vit, folder, OPTIONS)


def test_shard_of_another_store(tmp_path: Path, store: Path, items: RawItems, vit: ModelSpec) -> None:
    extract(items, vit, tmp_path / "other", replace(OPTIONS, dtype="float32"))
    shard_file(store, 0).unlink()
    shutil.copy(shard_file(tmp_path / "other", 0), store / "shards")
    with pytest.raises(InputError, match="is a shard of another store"):
        extract(items, vit, store, OPTIONS)


def test_worker_with_other_weights(tmp_path: Path, items: RawItems, vit: ModelSpec) -> None:
    """A machine of the cluster that has another model under the same name refuses to work."""
    other = ModelSpec(str(tiny.vit(tmp_path / "other", initializer_range=0.03)))

    class Elsewhere(LocalEngine):
        def run(self, job: Job, todo: Iterable[Shard], on_shard: object, on_items: object) -> None:
            super().run(replace(job, model=other), todo, on_shard, on_items)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="has other weights here than where the job was started"):
        extract(items, vit, tmp_path / "store", OPTIONS, engine=Elsewhere())
