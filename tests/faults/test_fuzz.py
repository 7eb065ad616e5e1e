"""What the readers make of files that nobody wrote: usable data or one line, never another exception, never a gigabyte.

Each target begins with whole files, cuts, repeats and overwrites pieces of them; some examples are no such file at all.
"""

import io
import json
import resource
import warnings
import wave
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from cenote.core import InputError
from cenote.core.files import read_card, read_tensors, sealed
from cenote.features.arrays import Unusable, open_array, whole_arrays
from cenote.features.arrow import open_arrow, shards_of
from cenote.features.dgcnn import open_dgcnn
from cenote.features.npz import open_npz
from cenote.features.raw import UnreadableError, open_raw
from cenote.features.raw.decode import check_image, decode_audio, decode_image
from cenote.features.table import read_csv
from cenote.features.validate import Problems

MOST = 2**30
TOLD = (InputError, Unusable, UnreadableError)


def made(write: Callable[[io.BytesIO], object]) -> bytes:
    held = io.BytesIO()
    write(held)
    return held.getvalue()


def hdf5(held: io.BytesIO) -> None:
    with h5py.File(held, "w") as file:
        file["x"] = X
        file.create_dataset("packed", data=X, compression="gzip")


def sound(held: io.BytesIO) -> None:
    with wave.open(held, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\1\2" * 100)


def arrow(held: io.BytesIO) -> None:
    with pa.ipc.new_file(held, TABLE.schema) as file:
        file.write_table(TABLE)


def of_array(path: Path) -> None:
    for _ in open_array(path).blocks():
        pass
    for read in whole_arrays(path).values():
        read()


def of_npz(path: Path) -> None:
    problems = Problems(str(path))
    source = open_npz(path, None, None, problems)
    for name in source.columns:
        source.columns[name]
    source.load(problems)


def of_arrow(path: Path) -> None:
    problems = Problems(str(path))
    source = open_arrow(shards_of(path), None, None, path)
    for name in source.columns:
        source.columns[name]
    source.load(problems)


def of_graphs(path: Path) -> None:
    open_dgcnn(path).load(Problems(str(path)))


def of_texts(path: Path) -> None:
    for item in open_raw(path).items:
        item.check()


def of_card(path: Path) -> None:
    read_card(path, "save it again", dim=int)


def of_tensors(path: Path) -> None:
    with suppress(ValueError):
        read_tensors(path)


def of_image(path: Path) -> None:
    data = path.read_bytes()
    check_image(data)
    decode_image(data)


def of_sound(path: Path) -> None:
    decode_audio(path.read_bytes())


X = np.arange(12, dtype=np.float32).reshape(4, 3)
TABLE = pa.table({"id": ["a", "b"], "x": [[[1.0, 2.0]], [[3.0, 4.0]]], "label": [0, 1]})
PICTURE = Image.new("RGB", (8, 8), (1, 2, 3))


class Target(NamedTuple):
    """A suffix, a whole file, and its reader."""

    suffix: str
    whole: bytes
    read: Callable[[Path], None]


TARGETS = {
    "npy": Target(".npy", made(lambda held: np.save(held, X)), of_array),
    "npz": Target(".npz", made(lambda held: np.savez(held, x=X)), of_array),
    "npz-packed": Target(".npz", made(lambda held: np.savez_compressed(held, x=X)), of_array),
    "npz-of-items": Target(".npz", made(lambda held: np.savez(held, x=X[None], y=[0], ids=["a"])), of_npz),
    "safetensors": Target(".safetensors", save({"x": torch.from_numpy(X)}), of_array),
    "hdf5": Target(".h5", made(hdf5), of_array),
    "pt": Target(".pt", made(lambda held: torch.save({"x": torch.ones(4, 3)}, held)), of_array),
    "pt-old": Target(
        ".pt", made(lambda held: torch.save(torch.ones(4, 3), held, _use_new_zipfile_serialization=False)), of_array
    ),
    "parquet": Target(".parquet", made(lambda held: pq.write_table(TABLE, held)), of_arrow),
    "arrow": Target(".arrow", made(arrow), of_arrow),
    "csv": Target(".csv", b'id,text,label\na,"one, ""two""",x\nb,three,y\n', lambda path: read_csv(path) and None),
    "texts-csv": Target(".csv", b'id,text,label\na,"one, ""two""",x\nb,three,y\n', of_texts),
    "texts-jsonl": Target(".jsonl", b'{"text": "one", "label": 1}\n{"text": "two", "label": 2}\n', of_texts),
    "texts-txt": Target(".txt", "one\ntwo ä\n".encode(), of_texts),
    "graphs": Target(".txt", b"2\n2 0\n0 1 1\n1 1 0\n1 1\n0 0 0.5\n", of_graphs),
    "card": Target(".json", json.dumps(sealed({"dim": 8, "format": 1})).encode(), of_card),
    "tensors": Target(".safetensors", save({"x": torch.ones(2)}, {"sha256": "0" * 64}), of_tensors),
    "png": Target(".png", made(lambda held: PICTURE.save(held, "PNG")), of_image),
    "jpeg": Target(".jpg", made(lambda held: PICTURE.save(held, "JPEG")), of_image),
    "tiff": Target(".tif", made(lambda held: PICTURE.save(held, "TIFF")), of_image),
    "gif": Target(".gif", made(lambda held: PICTURE.save(held, "GIF")), of_image),
    "wav": Target(".wav", made(sound), of_sound),
}

EDIT = st.tuples(
    st.sampled_from(["put", "cut", "drop", "repeat", "number"]),
    st.floats(0, 1),
    st.binary(min_size=1, max_size=6),
    st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]),
)
EDITS = st.one_of(st.lists(EDIT, min_size=1, max_size=5), st.binary(max_size=200))


def edited(whole: bytes, edits: "list[tuple[str, float, bytes, int]] | bytes") -> bytes:
    """A file after some edits, or other bytes altogether."""
    if isinstance(edits, bytes):
        return edits
    data = bytearray(whole)
    for what, share, piece, number in edits:
        at = int(share * len(data))
        size = 8 if number > 2**32 - 1 else 4
        if what == "put":
            data[at : at + len(piece)] = piece
        elif what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + len(piece)]
        elif what == "repeat":
            data[at:at] = data[at : at + 64] * piece[0]
        else:
            data[at : at + size] = number.to_bytes(size, "little")
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    "examples",
    [
        25,
        pytest.param(10_000, marks=[pytest.mark.slow("10,000 files for each reader"), pytest.mark.timeout(3600)]),
    ],
)
def test_any_bytes_give_data_or_one_line(name: str, examples: int, tmp_path: Path) -> None:
    target = TARGETS[name]
    file = tmp_path / f"file{target.suffix}"
    file.write_bytes(target.whole)
    if name != "tensors":
        target.read(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(EDITS)
    def run(edits: "list[tuple[str, float, bytes, int]] | bytes") -> None:
        # what is mapped keeps what it saw: another file each time
        file.unlink(missing_ok=True)
        file.write_bytes(edited(target.whole, edits))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(*TOLD):
                target.read(file)

    run()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST, f"{grown:,} bytes"


@pytest.mark.parametrize("name", ["x.npy", "../../x.npy", "/x.npy"])
def test_names_in_an_archive_lead_nowhere(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(name, made(lambda held: np.save(held, X)))
    assert [block.tolist() for block in open_array(tmp_path / "a.npz").blocks()] == [X.tolist()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz"]
