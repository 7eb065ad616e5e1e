"""One bag of 100,000 x 384 among 500 small ones loads in memory close to the data's own size."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import table
from .test_formats import save_item

LONG, SHORT, SMALL, DIM = 100_000, 20, 500, 384
pytestmark = [
    pytest.mark.slow("170 MB go through the disk for each format"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

PROGRAM = """
import sys
import cenote.features as features

def kilobytes(name):
    # not getrusage, whose maximum outlives exec and so counts the process that started this one
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

features.read(sys.argv[1])  # whatever reading imports is loaded now
before = kilobytes("VmRSS")
data = features.read(sys.argv[2])
print(data.nbytes(), (kilobytes("VmHWM") - before) * 1024)
"""


def growth(warm: Path, path: Path) -> float:
    """Growth of the peak resident memory while reading, as a multiple of the tokens' own bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(warm), str(path)], capture_output=True, text=True, check=True
    )
    held, grown = map(int, done.stdout.split())
    assert held == (LONG + SMALL * SHORT) * DIM * 4
    return grown / held


def bag(i: int, rng: np.random.RandomState, scale: int) -> np.ndarray:
    return rng.rand(LONG // scale if i == 0 else SHORT, DIM).astype(np.float32)


def make_folder(root: Path, suffix: str) -> tuple[Path, Path]:
    made = []
    for name, scale, count in (("warm", 10_000, 6), ("large", 1, SMALL + 1)):
        rng = np.random.RandomState(0)
        (root / name).mkdir()
        for i in range(count):
            save_item(root / name / f"{i}{suffix}", bag(i, rng, scale))
        table(root / name, ["id", "label"], [[i, i % 2] for i in range(count)])
        made.append(root / name)
    return made[0], made[1]


def make_npz(root: Path, masked: bool) -> tuple[Path, Path]:
    rng = np.random.RandomState(0)
    for name, long, small in (("warm", 9, 5), ("large", LONG, SMALL)):
        lengths = np.array([long, *[SHORT] * small])
        if masked:
            # every second token of 100 items is padding
            tokens = 2 * ((LONG + SMALL * SHORT) // 100 if name == "large" else 9)
            x = rng.rand(100, tokens, DIM).astype(np.float32)
            mask = (np.arange(tokens) + np.arange(100)[:, None]) % 2 == 0
            np.savez(root / f"{name}.npz", x=x, mask=mask, y=np.arange(100) % 2)
        else:
            x = rng.rand(lengths.sum(), DIM).astype(np.float32)
            np.savez(root / f"{name}.npz", x=x, offsets=np.r_[0, lengths.cumsum()], y=np.arange(len(lengths)) % 2)
    return root / "warm.npz", root / "large.npz"


def make_arrow(root: Path, suffix: str, lengths: np.ndarray) -> tuple[Path, Path]:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    rng = np.random.RandomState(0)
    for name, chosen in (("warm", lengths[-6:]), ("large", lengths)):
        numbers = pa.array(rng.rand(chosen.sum() * DIM).astype(np.float32))
        tokens = pa.FixedSizeListArray.from_arrays(numbers, DIM).cast(pa.list_(pa.float32()))
        vectors = pa.ListArray.from_arrays(pa.array(np.r_[0, chosen.cumsum()].astype(np.int32)), tokens)
        made = pa.table({"v": vectors, "label": np.arange(len(chosen)) % 2})
        if suffix == ".parquet":
            pa.parquet.write_table(made, root / f"{name}.parquet", use_dictionary=False)
        else:
            pa.feather.write_feather(made, root / f"{name}{suffix}", compression="uncompressed", chunksize=50)
    return root / f"warm{suffix}", root / f"large{suffix}"


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".npz", ".h5"])
def test_folder_is_held_once(tmp_path: Path, suffix: str) -> None:
    assert growth(*make_folder(tmp_path, suffix)) < 1.25


@pytest.mark.parametrize("masked", [False, True])
def test_npz_is_held_once(tmp_path: Path, masked: bool) -> None:
    assert growth(*make_npz(tmp_path, masked)) < 1.25


def test_torch_files_and_arrow_are_mapped(tmp_path: Path) -> None:
    # the pages of the mapped file count as resident, too, until the system wants them back
    (tmp_path / "pt").mkdir()
    assert growth(*make_folder(tmp_path / "pt", ".pt")) < 2.1
    assert growth(*make_arrow(tmp_path, ".arrow", np.array([LONG, *[SHORT] * SMALL]))) < 2.25


def test_parquet_is_read_in_batches(tmp_path: Path) -> None:
    # rows of 100 tokens: pyarrow decodes a row whole, at several times its own size
    lengths = np.full((LONG + SMALL * SHORT) // 100, 100)
    assert growth(*make_arrow(tmp_path, ".parquet", lengths)) < 1.25
