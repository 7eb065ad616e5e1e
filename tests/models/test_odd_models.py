"""Folders that are nearly models, and what is asked of a model that it cannot do."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import tiny

from cenote.core import InputError
from cenote.models import load


def changed(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def test_weights_of_another_size_are_named(tmp_path: Path) -> None:
    changed(tiny.vit(tmp_path), hidden_size=64)
    with pytest.raises(
        InputError, match=r"do not fit its config.json: .* is \[.*32.*\] in the file, and should be \[.*64"
    ):
        load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_weights_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tiny.vit(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"its weights cannot be read .*is the file whole, and no pointer of Git LFS"):
        load(str(tmp_path))


def test_code_of_the_model_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.transformers()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    changed(tiny.vit(tmp_path), model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    (tmp_path / "mine.py").write_text("import json\n")
    with pytest.raises(InputError, match=r"its own Python code failed .AttributeError"):
        load(str(tmp_path), trust_remote_code=True)


def test_files_and_revisions_are_no_folders(tmp_path: Path) -> None:
    tiny.vit(tmp_path)
    with pytest.raises(InputError, match=r"config.json is a file; name the folder"):
        load(str(tmp_path / "config.json"))
    with pytest.raises(InputError, match=r"revision: .* is a local folder, and has only one"):
        load(str(tmp_path), revision="v2")
    with pytest.raises(InputError, match=r"max_length: cuts texts, and .* takes image"):
        load(str(tmp_path), max_length=8)


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    for file in tiny.bert(tmp_path).glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"the tokenizer of .* knows no word; save the model's tokenizer"):
        load(str(tmp_path))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": 31 + i for i in range(20)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    backbone = load(str(tmp_path))
    assert "its tokenizer has 51 tokens, the model 40: do they fit?" in backbone.layout.notes
    backbone(["a word8"])
    with pytest.raises(InputError, match=r"the tokenizer gives token 40 .'word9'., but the model knows 40 only"):
        backbone(["a word9"])


def test_lengths_that_leave_no_token_of_the_text(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    for length in (1, 2):
        with pytest.raises(
            InputError, match=f"max_length: 2 of the tokens .* so that {length} leave none .* give 3 or more"
        ):
            load(str(tmp_path), max_length=length)
    assert load(str(tmp_path), max_length=3)(["a b c"]).layers[3].shape[1] == 3


@pytest.mark.parametrize("masked", [False, True])
def test_sounds_shorter_than_a_frame_give_one_token(tmp_path: Path, masked: bool) -> None:
    backbone = load(str(tiny.made(tmp_path, "Wav2Vec2Model", tiny.waves(masked), **tiny.WAVES)))
    rng = np.random.RandomState(0)
    for length in (1, 50, 104, 105):
        assert backbone([(rng.randn(length).astype(np.float32), 16000)]).layers[2].shape[1] == 1
    if masked:
        states = backbone([(rng.randn(n).astype(np.float32), 16000) for n in (1, 4000)])
        assert states.mask is not None
        assert states.mask.sum(1).tolist()[0] == 1
        assert torch.isfinite(states.layers[2]).all()


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tiny.vit(tmp_path) / "model.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    assert "its output for the sample holds NaN or infinite numbers" in load(str(tmp_path)).layout.notes
