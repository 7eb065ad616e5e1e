"""What once was a traceback is one line that says what is wrong and what to do."""

import io
import json
import zipfile
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import cenote
from cenote.core import InputError
from cenote.core.files import require_place, sealed, write_whole
from cenote.features import read
from cenote.features.arrays import Unusable, open_array, whole_arrays
from cenote.features.labelling import Labelling
from cenote.features.raw import open_raw
from cenote.features.validate import Problems, check_ids
from cenote.models.base import layer_numbers

NPY = io.BytesIO()
np.save(NPY, np.ones((3, 2), np.float32))
WHOLE = NPY.getvalue()


def header(**fields: object) -> bytes:
    text = json.dumps(fields).replace("Infinity", "1e999").encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 64


def npy(text: str) -> bytes:
    padded = text.encode().ljust(118 - 10) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + b"\0" * 64


def zipped(name: str, method: int | None = None, encrypted: bool = False) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(name, WHOLE)
    data = bytearray(held.getvalue())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        where = data.index(mark) + at
        if encrypted:
            data[where] |= 1
        if method is not None:
            data[where + 2 : where + 4] = method.to_bytes(2, "little")
    return bytes(data)


def pt(tensor: object) -> bytes:
    held = io.BytesIO()
    torch.save(tensor, held)
    return held.getvalue()


ARRAYS = {
    "encrypted.npz": zipped("x.npy", encrypted=True),
    "unknown-method.npz": zipped("x.npy", method=77),
    "token-error.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2"),
    "null-bytes.npy": npy("{'descr': '<f4\0', 'fortran_order': False, 'shape': (3, 2)}"),
    "nested.npy": npy("(" * 100),
    "negative.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 2)}"),
    "huge-of-nothing.npy": npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {10**30})}}"),
    "odd-type.npy": npy("{'descr': 'nonsense', 'fortran_order': False, 'shape': (3, 2)}"),
    "infinite-shape.safetensors": header(x={"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 64]}),
    "negative-offset.safetensors": header(x={"dtype": "F32", "shape": [8, 2], "data_offsets": [-64, 0]}),
    "backwards.safetensors": header(x={"dtype": "F32", "shape": [8, 2], "data_offsets": [64, 0]}),
    "fraction.safetensors": header(x={"dtype": "F32", "shape": [8.0, 2], "data_offsets": [0, 64]}),
    "deep.safetensors": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "list.safetensors": (2).to_bytes(8, "little") + b"[]",
    "empty.safetensors": b"",
    "empty.h5": b"",
    "damaged.h5": b"\x89HDF\r\n\x1a\n" + b"\0" * 100,
    "meta.pt": pt(torch.empty(3, 2, device="meta")),
    "sparse.pt": pt(torch.eye(3).to_sparse()),
    "sparse-in-dict.pt": pt({"x": torch.eye(3).to_sparse()}),
    "text.pt": b"no archive",
    "number.pt": pt(3),
    "empty.pt": b"",
    "cut.pt": pt(torch.ones(3, 2))[:200],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(ARRAYS[name])
    with pytest.raises(Unusable) as told:
        for _ in open_array(tmp_path / name).blocks():
            pass
    assert "\n" not in str(told.value)
    with pytest.raises(InputError, match=r"labels\.csv|holds"):
        read(tmp_path)
    (tmp_path / "labels.csv").write_text(f"id,label\n{name},a\n")
    with pytest.raises(InputError):
        read(tmp_path)
    with suppress(Unusable):
        for held in whole_arrays(tmp_path / name).values():
            held()


def test_an_npz_of_all_items_that_is_encrypted(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(ARRAYS["encrypted.npz"])
    with pytest.raises(InputError, match="is encrypted"):
        read(tmp_path / "a.npz")


def test_hdf5_that_holds_nothing_or_is_damaged(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "nothing.h5", "w") as file:
        file["x"] = h5py.Empty("f4")
    with pytest.raises(Unusable, match="holds no array"):
        open_array(tmp_path / "nothing.h5")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' * 50_000, "[1]", "3", "{"])
def test_lines_that_are_no_objects(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match="line 2"):
        open_raw(tmp_path / "a.jsonl")


@pytest.mark.filterwarnings("ignore::cenote.core.files.UncheckedWarning")
@pytest.mark.parametrize("card", ["{}", "[]", "null", "[" * 100_000, "3", '"text"', '{"format": 1}', '{"same_as": []}'])
def test_a_saved_probe_whose_card_is_none(card: str, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text(card)
    with pytest.raises(InputError, match=r"probe\.json: is damaged"):
        cenote.load(tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, None])
def test_a_seed_that_is_none(seed: object) -> None:
    with pytest.raises(InputError, match="split_seed: expected a whole number from 0"):
        Labelling(seed=seed)  # type: ignore[arg-type]


def test_a_range_of_layers_that_no_memory_holds() -> None:
    with pytest.raises(InputError, match="there is no layer 7"):
        layer_numbers("0-99999999999", range(7))
    with pytest.raises(InputError, match="there is no layer 88888888888"):
        layer_numbers("88888888888-99999999999", range(7))


def test_names_that_are_no_text() -> None:
    problems = Problems("data")
    check_ids(["a", "b\udcff"], problems)
    with pytest.raises(InputError, match=r"the name 'b\\udcff' is no UTF-8 text"):
        problems.raise_any()


def test_a_page_with_a_path_that_is_no_text(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.html", "run\udcff")
    assert (tmp_path / "a.html").read_text("utf-8") == "run\\udcff"


def test_letters_that_a_terminal_has_not_are_escaped() -> None:
    from cenote.cli.app import _take_any_text

    held = io.BytesIO()
    terminal = io.TextIOWrapper(held, encoding="ascii")
    _take_any_text(terminal)
    terminal.write("★ snö \udcff")
    terminal.flush()
    assert held.getvalue() == rb"\u2605 sn\xf6 \udcff"


def test_what_cannot_be_checked_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from cenote.cli.app import _showing
    from cenote.core.files import UncheckedWarning

    others: list[object] = []
    show = _showing(lambda *given: others.append(given[0]))
    show(UncheckedWarning("a.json was written before"), UncheckedWarning, "files.py", 1)
    show(UserWarning("else"), UserWarning, "files.py", 1)
    assert capsys.readouterr().err == "note: a.json was written before\n"
    assert [str(other) for other in others] == ["else"]


def test_a_file_where_a_folder_stands(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"out: .* is a folder; name a file"):
        require_place(tmp_path, "out")
    with pytest.raises(InputError, match=r"out: cannot make .*file is a file"):
        require_place(tmp_path / "file" / "a.csv", "out")
    require_place(tmp_path / "new" / "a.csv", "out")


@pytest.mark.parametrize("zero", ["num_attention_heads", "patch_size"])
def test_a_configuration_that_builds_nothing(zero: str, tmp_path: Path) -> None:
    from tests import tiny

    from cenote.models import load

    folder = Path(tiny.vit(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, zero: 0}))
    with pytest.raises(InputError, match="backbone: "):
        load(str(folder))


def numbers_in(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where numbers stand in what JSON holds."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, part in inner for found in numbers_in(part, (*path, key))]
    return [path] if isinstance(value, int | float) and not isinstance(value, bool) else []


def put(value: object, path: tuple[object, ...], new: object) -> None:
    for key in path[:-1]:
        value = value[key]  # type: ignore[index]
    value[path[-1]] = new  # type: ignore[index]


@pytest.mark.parametrize(
    ("new", "most"),
    [
        ("many", 6),
        *(pytest.param(new, 10**6, marks=pytest.mark.slow("hundreds of pages")) for new in ("many", None, [], 1e308)),
    ],
    ids=str,
)
def test_a_report_on_numbers_that_are_none(new: object, most: int, tmp_path: Path) -> None:
    """With the right digest: numbers replaced in turn. The page is made, or one line says why not."""
    from tests.report.factory import make_comparison, write_run

    from cenote.report import write

    write_run(tmp_path, make_comparison(2), items=1)
    text = (tmp_path / "comparison.json").read_text()
    places = numbers_in(json.loads(text))
    said = []
    for place in places[:: max(1, len(places) // most)]:
        changed = json.loads(text)
        put(changed, place, new)
        (tmp_path / "comparison.json").write_text(json.dumps(sealed(changed)))
        try:
            write(tmp_path)
        except InputError as error:
            said.append(str(error))
    assert not [text for text in said if "\n" in text]
