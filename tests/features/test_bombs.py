"""Small files that claim to be huge are refused by what their headers say, with the item, and can be skipped or allowed."""

import io
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from cenote.cli import options
from cenote.core import InputError
from cenote.features import read
from cenote.features.arrays import Unusable, limited, open_array, whole_arrays
from cenote.features.raw import UnreadableError, open_raw
from cenote.features.raw.decode import check_image, decode_audio, decode_image

ROWS, DIM = 500_000, 1024


def image(side: int) -> bytes:
    made = io.BytesIO()
    Image.new("1", (side, side)).save(made, "PNG")
    return made.getvalue()


def wav(rate: int, frames: int) -> bytes:
    made = io.BytesIO()
    wavfile.write(made, rate, np.zeros(frames, np.int16))
    return made.getvalue()


def test_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    large, refused = (
        image(13_000),
        r"has 13,000 x 13,000 pixels, which takes 1\.4 GB; the limit is 1\.0 GB, see max_item",
    )
    for look in (check_image, decode_image):
        with pytest.raises(UnreadableError, match=refused):
            look(large)
    check_image(large, 2 * 10**9)
    with pytest.raises(UnreadableError, match="has 100 x 100 pixels"):
        decode_image(image(100), 10_000)


def test_sounds_are_refused_by_what_they_become() -> None:
    refused = r"is 100,000 seconds of 1 channels at 1 samples a second, which takes 6\.4 GB"
    with pytest.raises(UnreadableError, match=refused):
        decode_audio(wav(1, 100_000))
    assert len(decode_audio(wav(1, 10)).samples) == 10
    soundfile = pytest.importorskip("soundfile")
    made = io.BytesIO()
    soundfile.write(made, np.zeros(100_000, np.float32), 1, format="FLAC")
    with pytest.raises(UnreadableError, match=refused):
        decode_audio(made.getvalue())


def test_raw_items_are_named_and_others_read(tmp_path: Path) -> None:
    for name, side in (("a", 20), ("b", 200)):
        (tmp_path / f"{name}.png").write_bytes(image(side))
    small, large = open_raw(tmp_path, max_item_size=8 * 10_000).items
    small.read()
    for look in (large.read, large.check):
        with pytest.raises(UnreadableError, match="has 200 x 200 pixels"):
            look()
    with pytest.raises(UnreadableError, match="is a large file"):
        open_raw(tmp_path, max_item_size=10).items[0].read()
    for item in open_raw(tmp_path).items:
        item.read()


def h5(path: Path) -> Path:
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file.create_dataset("x", (ROWS, DIM), "f4", chunks=(1024, DIM))
    return path.with_suffix(".h5")


def npz(path: Path) -> Path:
    """As numpy writes it, without ever holding the array."""
    with (
        zipfile.ZipFile(path.with_suffix(".npz"), "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (20_000, DIM)})
        for _ in range(20):
            file.write(bytes(1000 * DIM * 4))
    return path.with_suffix(".npz")


def pt(path: Path) -> Path:
    torch.save(torch.zeros(1).expand(ROWS, DIM), path.with_suffix(".pt"))
    return path.with_suffix(".pt")


@pytest.mark.parametrize(("make", "limit"), [(h5, 10**9), (npz, 10**7), (pt, 10**9)])
def test_arrays_are_refused_by_their_headers(make: Any, limit: int, tmp_path: Path) -> None:
    path = make(tmp_path / "bomb")
    with limited(limit):
        with pytest.raises(Unusable, match=r"would take [\d.]+ GB in memory, of [\d,]+ bytes on disk; the limit is"):
            open_array(path)
        if make is not pt:
            with pytest.raises(Unusable, match="would take"):
                whole_arrays(path)["x"]()
    with limited(10**10):
        assert open_array(path).shape[1] == DIM


def test_what_is_as_large_on_disk_is_read_whatever_its_size(tmp_path: Path) -> None:
    np.save(tmp_path / "honest.npy", np.ones((100, 8), np.float32))
    with limited(1):
        assert open_array(tmp_path / "honest.npy").shape == (100, 8)


def test_items_of_a_folder_are_named(tmp_path: Path) -> None:
    for i in range(8):
        np.save(tmp_path / f"i{i}.npy", np.ones((3, DIM), np.float32))
    h5(tmp_path / "bomb")
    rows = [f"i{i},{'ab'[i % 2]}" for i in range(8)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows, "bomb,a"]))
    with pytest.raises(InputError, match=r"item 'bomb' \(bomb.h5\) would take 2\.0 GB in memory"):
        read(tmp_path)


def test_parquet_is_refused_by_its_count_of_numbers(tmp_path: Path) -> None:
    vectors = [np.zeros(1024, np.float32)] * 200
    table = pa.table({"x": [vectors] * 20, "label": ["a", "b"] * 10})
    pq.write_table(table, tmp_path / "bomb.parquet")
    with pytest.raises(InputError, match=r"bomb.parquet: would take 0\.0 GB in memory, of [\d,]+ bytes on disk"):
        read(tmp_path / "bomb.parquet", max_item_size=10**6)
    with pytest.raises(InputError, match="max_item_size: expected a positive number, got 0"):
        read(tmp_path / "bomb.parquet", max_item_size=0)


def test_sizes_in_words() -> None:
    assert options.parsed_size(options.DEFAULT_SIZE) == 10**9
    with pytest.raises(InputError, match="--max-item-size: expected a size such as 500MB or 4GB, got 'much'"):
        options.parsed_size("much")
