"""A user's files can't choose what is read: nothing outside of their folder, no device, no pipe, no pickle."""

import io
import json
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from cenote.core import InputError
from cenote.core.files import inside, read_regular
from cenote.features.arrays import Unusable, open_array, whole_arrays
from cenote.features.arrow import shards_of
from cenote.features.raw import UnreadableError, bytes_at, digest_of, text_at
from cenote.features.raw.tables import CellItem
from cenote.features.store.pictures import StoredPictures
from cenote.models import sources
from cenote.models.timm import named

SEEN = {"do_resize": False}


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """What hangs whoever opens it."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/passwd", "a\0b", "..\\x", 3, None])
def test_a_name_that_leads_out_of_its_folder(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path, name)


def test_devices_and_pipes_are_not_read(pipe: Path) -> None:
    for path in (pipe, Path("/dev/zero"), pipe.parent):
        with pytest.raises(OSError, match=r"is no file|Is a directory"):
            read_regular(path)
        for read in (bytes_at, text_at):
            with pytest.raises(UnreadableError):
                read(str(path))
        with pytest.raises(UnreadableError):
            text_at(f"{path}#text/0")


def png(shade: int) -> bytes:
    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(held, "PNG")
    return held.getvalue()


def test_only_the_picture_that_was_extracted_is_shown(tmp_path: Path, pipe: Path) -> None:
    whole, other = png(10), png(20)
    assert len(whole) == len(other), "only the bytes tell"
    file = tmp_path / "a.png"
    file.write_bytes(whole)
    found = StoredPictures([str(file), "/dev/zero", str(pipe)], [digest_of(whole)] * 3, [len(whole), None, None], SEEN)
    assert found[0] is not None
    assert found[1] is None
    assert found[2] is None
    file.write_bytes(other)
    with pytest.raises(UnreadableError, match="another file lies where its image lay"):
        found.shown(0)
    file.write_bytes(whole + b"more")
    with pytest.raises(UnreadableError, match="expected no more than"):
        found.shown(0)
    assert StoredPictures([str(file)], [digest_of(b"")], [None], SEEN)[0] is None


def test_the_page_has_bars_and_the_reason_where_there_is_no_picture(tmp_path: Path) -> None:
    from tests.report.factory import keep_attention, make_comparison, write_run

    from cenote.report import write

    write_run(tmp_path, make_comparison(2), items=1, images=False)
    raw = json.loads((tmp_path / "attention.json").read_text())
    raw["items"][0]["unpictured"] = "another <file> lies there"
    keep_attention(tmp_path, raw)
    page = write(tmp_path).read_text("utf-8")
    assert "its image is not shown: another &lt;file&gt; lies there" in page
    assert 'class="bars"' in page
    assert 'alt="mean: weights over' not in page


def test_a_cell_that_names_a_file_elsewhere(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "secret.png").write_bytes(png(1))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "own.png").write_bytes(png(1))
    paths = ["own.png", "../secret.png", str(tmp_path / "secret.png"), "/dev/zero"]
    pq.write_table(pa.table({"image": [{"bytes": None, "path": path} for path in paths]}), folder / "a.parquet")
    items = [CellItem(str(row), folder / "a.parquet", "image", row, "image") for row in range(len(paths))]
    assert items[0].read().content.size == (4, 4)
    for item in items[1:]:
        with pytest.raises(UnreadableError, match=r"lies elsewhere: .* leads out of"):
            item.read()


@pytest.mark.parametrize("name", ["..", "../other", "/tmp"])
def test_a_folder_of_datasets_that_names_files_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match="leads out of"):
        shards_of(tmp_path / "saved")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(InputError, match="leads out of"):
        shards_of(tmp_path)


def test_numbers_of_hdf5_that_lie_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\1" * 64)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.ones((4, 2), np.float32)
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("x", (4, 2), np.float32, external=[(str(tmp_path / "secret"), 0, 32)])
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout((4, 2), np.float32)
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (4, 2))
        file.create_virtual_dataset("x", layout)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
    for name, said in (("external", "in other files"), ("virtual", "in other files"), ("link", "holds no array")):
        with pytest.raises(Unusable, match=said):
            open_array(tmp_path / f"{name}.h5")
    with pytest.raises(Unusable, match="in other files"):
        whole_arrays(tmp_path / "external.h5")


@pytest.mark.parametrize("name", ["..", "../other", "/tmp"])
def test_modules_of_a_model_that_lie_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Transformer", "path": name}]))
    with pytest.raises(InputError, match="leads out of"):
        sources.transformer_inside(tmp_path)


@pytest.mark.parametrize("modules", ["[" * 100_000, "null", "[3]", "{}", '[{"type": "a.Transformer", "path": "gone"}]'])
def test_modules_that_are_none(modules: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(InputError, match=r"is no JSON file|without a Transformer|which is no folder"):
        sources.transformer_inside(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "local-dir:/tmp/x"},
        {"architecture": "hf-hub:a/b"},
        {"architecture": "../vit"},
        {"architecture": 3},
        {"architecture": "vit", "model_args": {"checkpoint_path": "/etc/passwd"}},
        {"architecture": "vit", "model_args": {"pretrained": True}},
        {"architecture": "vit", "model_args": {"pretrained_cfg": {"file": "/etc/passwd"}}},
        {"architecture": "vit", "model_args": ["pretrained"]},
    ],
    ids=str,
)
def test_a_timm_model_that_names_weights_elsewhere(config: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        named(config, tmp_path)


def test_a_timm_model_that_names_none() -> None:
    config = {"architecture": "vit_tiny.v1", "model_args": {"img_size": 32}}
    assert named(config, Path("model")) == ("vit_tiny.v1", {"img_size": 32})


def test_an_index_that_names_pickles_or_files_elsewhere(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(InputError, match="leads out of"):
        sources.require_own_files(tmp_path, pickles=True)
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(InputError, match=r"names pytorch_model\.bin, which may be a pickle"):
        sources.require_own_files(tmp_path, pickles=False)
    sources.require_own_files(tmp_path, pickles=True)
    for content in ("[]", "{}", "[" * 100_000):
        index.write_text(content)
        with pytest.raises(InputError):
            sources.require_own_files(tmp_path, pickles=False)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    sources.require_own_files(tmp_path, pickles=False)


def test_a_tokenizer_that_names_a_file_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = folder / "tokenizer_config.json"
    (tmp_path / "secret").write_text("a")
    for name in ("../secret", str(tmp_path / "secret"), "/dev/zero"):
        config.write_text(json.dumps({"vocab_file": name}))
        with pytest.raises(InputError, match="leads out of"):
            sources.require_own_files(folder, pickles=False)
    # many configurations name what lay in the cache of whoever saved them
    config.write_text(json.dumps({"tokenizer_file": "/nobody/.cache/tokenizer.json"}))
    sources.require_own_files(folder, pickles=False)
    os.mkfifo(folder / "vocab.txt")
    with pytest.raises(InputError, match="is neither a file nor a folder"):
        sources.require_own_files(folder, pickles=False)


def test_an_adapter_of_pickles(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="has an adapter without"):
        sources.require_own_files(tmp_path, pickles=False)
    sources.require_own_files(tmp_path, pickles=True)


def test_no_pickle_is_loaded_whatever_its_name(tmp_path: Path) -> None:
    """With a name that promises another format too."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": torch.ones(2, 3), "y": Evil()}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", x=np.array([Evil()], dtype=object))
    np.save(tmp_path / "a.npy", np.array([Evil()], dtype=object))
    for suffix in (".safetensors", ".h5", ".npy", ".npz"):
        (tmp_path / f"b{suffix}").write_bytes((tmp_path / "a.pt").read_bytes())
    for file in sorted(tmp_path.glob("[ab].*")):
        with pytest.raises(Unusable):
            open_array(file)
        with suppress(Unusable):
            for read in whole_arrays(file).values():
                read()
    assert not (tmp_path / "ran").exists()


def test_code_that_lies_with_a_model_counts(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("scale = 1\n")
    before = sources.code_sha256(tmp_path)
    assert sources.code_sha256(tmp_path) == before
    (tmp_path / "modeling.py").write_text("scale = 3\n")
    assert sources.code_sha256(tmp_path) != before


def test_code_of_a_model_decides_its_store(tmp_path: Path) -> None:
    from tests import tiny

    from cenote.jobs.extract.plan import _identified
    from cenote.models import load

    folder = Path(tiny.vit(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoModel": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    code = "from transformers import ViTModel\n\n\nclass Own(ViTModel):\n    scale = {}\n"
    found = []
    for scale in (1, 3, 1):
        (folder / "modeling_own.py").write_text(code.format(scale))
        found.append(_identified(load(str(folder), trust_remote_code=True)))
    assert found[0] == found[2]
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"code_sha256"}
    # nothing is said of code that was not run, so that stores of before go on
    (folder / "config.json").write_text(json.dumps(config))
    assert "code_sha256" not in _identified(load(str(folder)))


def test_code_of_a_method_is_in_the_key_of_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    import cenote.pool.basic.max as edited
    from cenote.compare import sources as read
    from cenote.pool import MaxPool, MeanPool

    before = read.source_digest(MaxPool), read.source_digest(MeanPool)
    plain = read._read
    changed = {Path(str(edited.__file__)): "0" * 64}
    monkeypatch.setattr(read, "_read", lambda path: plain(path)._replace(digest=changed.get(path, plain(path).digest)))
    assert read.source_digest(MaxPool) != before[0]
    assert read.source_digest(MeanPool) == before[1]


def test_weights_are_told_by_their_bytes_not_by_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    before = sources.weights_sha256([file])
    file.write_bytes(b"two")
    os.utime(file, (1, 1))
    assert sources.weights_sha256([file]) != before


def test_torchvision_counts_where_it_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    from cenote.core import libraries
    from cenote.models.vision import preparing

    monkeypatch.setattr(libraries, "version", lambda name: f"{name} 1")
    by_pil, by_torchvision = SimpleNamespace(backend="pil"), SimpleNamespace(backend="torchvision")
    assert "torchvision" not in libraries.versions(*preparing(by_pil))
    assert libraries.versions(*preparing(by_torchvision))["torchvision"] == "torchvision 1"
