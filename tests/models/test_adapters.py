"""Adapters of every family: tokens, layers, attentions and prefix tokens, found by what the model is."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from cenote.core import InputError
from cenote.models import Backbone, chosen_layers, load
from cenote.models.grids import lie

IMAGES = {
    "vit": ("ViTModel", {**tiny.SMALL, **tiny.VISION}, 1),
    "deit": ("DeiTModel", {**tiny.SMALL, **tiny.VISION}, 2),
    "dinov2": ("Dinov2Model", tiny.DINO, 1),
    "dinov2 with registers": ("Dinov2WithRegistersModel", {**tiny.DINO, "num_register_tokens": 4}, 5),
    "mae": (
        "ViTMAEModel",
        {**tiny.SMALL, **tiny.VISION, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
         "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16},
        1,
    ),
    "beit": ("BeitModel", {**tiny.SMALL, **tiny.VISION}, 1),
}  # fmt: skip
TEXTS = {
    "bert": ("BertModel", tiny.TEXT, tiny.words, 1),
    "roberta": ("RobertaModel", tiny.TEXT, tiny.words, 1),
    "t5": ("T5Model", {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4},
           tiny.words, 1),
    "gpt2": ("GPT2Model", {"vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32},
             tiny.words_without_padding, 0),
    "llama": ("LlamaForCausalLM", tiny.TEXT, tiny.words_without_padding, 0),
}  # fmt: skip


def photo(seed: int = 0) -> Any:
    from PIL import Image

    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", IMAGES)
def test_images(tmp_path: Path, family: str) -> None:
    model, settings, prefix = IMAGES[family]
    backbone = load(str(tiny.made(tmp_path, model, tiny.images, **settings)))
    layout = backbone.layout
    assert (layout.kind, layout.blocks, layout.prefix_tokens, layout.grid) == ("image", 3, prefix, (4, 4))
    assert layout.tokens == (16 + prefix,) * 4
    assert (layout.dims, layout.heads, layout.notes) == ((32,) * 4, 4, ())
    states = backbone([photo(0), photo(1)], layers=[0, 2, 3], attentions=True)
    assert list(states.layers) == [0, 2, 3]
    assert states.layers[2].shape == (2, 16 + prefix, 32)
    assert states.mask is None
    assert backbone.lengths([photo(0), photo(1)], 3) == [16 + prefix] * 2
    assert states.attentions is not None
    assert [tuple(a.shape) for a in states.attentions] == [(2, 4, 16 + prefix, 16 + prefix)] * 3
    assert torch.allclose(states.attentions[0].sum(-1), torch.ones(()), atol=1e-5)


def test_the_last_layer_is_the_models_output(tmp_path: Path) -> None:
    """And the others are its hidden states: compared with the library called directly."""
    library = tiny.transformers()
    tiny.made(tmp_path, "Dinov2Model", tiny.images, **tiny.DINO)
    backbone = load(str(tmp_path))
    model = library.AutoModel.from_pretrained(tmp_path).eval()
    pixels = library.AutoImageProcessor.from_pretrained(tmp_path)(images=[photo()], return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels, output_hidden_states=True)
    got = backbone([photo()], layers=range(4)).layers
    assert torch.equal(got[3], expected.last_hidden_state)
    assert not torch.equal(got[3], expected.hidden_states[3])
    for number in range(3):
        assert torch.equal(got[number], expected.hidden_states[number])


def test_masked_autoencoder_sees_every_patch_in_order(tmp_path: Path) -> None:
    model, settings, _ = IMAGES["mae"]
    backbone = load(str(tiny.made(tmp_path, model, tiny.images, **settings)))
    first, again = (backbone([photo()]).layers[3] for _ in range(2))
    assert torch.equal(first, again)
    # another patch changes first of all the token that stands in its place
    changed = photo()
    changed.paste((255, 255, 255), (45, 0, 60, 10))
    difference = (backbone([changed], [0]).layers[0] - backbone([photo()], [0]).layers[0]).abs().sum(2)[0, 1:]
    assert int(difference.argmax()) == 3


def test_feature_maps_become_tokens(tmp_path: Path) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
    backbone = load(str(tiny.made(tmp_path, "ResNetModel", tiny.images, **sizes)))
    assert backbone.layout.dims == (8, 8, 16, 32, 64)
    assert backbone.layout.tokens == (64, 64, 16, 4, 1)
    assert (backbone.layout.prefix_tokens, backbone.layout.grid) == (0, (1, 1))
    assert backbone([photo()], layers=[2]).layers[2].shape == (1, 16, 16)
    with pytest.raises(InputError, match="they differ in tokens x width"):
        chosen_layers("1,2", backbone.layout)
    with pytest.raises(InputError, match="attentions: ResNetModel gives no attention weights"):
        backbone([photo()], attentions=True)


def test_windowed_transformer(tmp_path: Path) -> None:
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [2, 2, 2]}
    layout = load(str(tiny.made(tmp_path, "SwinModel", tiny.images, window_size=2, **sizes))).layout
    assert (layout.prefix_tokens, layout.grid, layout.tokens[-1]) == (0, (4, 4), 16)


@pytest.mark.parametrize("family", TEXTS)
def test_texts(tmp_path: Path, family: str) -> None:
    model, settings, save, prefix = TEXTS[family]
    backbone = load(str(tiny.made(tmp_path, model, save, **settings)))
    assert (backbone.layout.kind, backbone.layout.blocks, backbone.layout.prefix_tokens) == ("text", 3, prefix)
    alone = backbone(["a b c"], layers=[1, 3])
    together = backbone(["a b c", "d e f g h i j"], layers=[1, 3], attentions=True)
    assert alone.mask is None
    assert together.mask is not None
    real = together.mask[0]
    assert int(real.sum()) == alone.layers[3].shape[1]
    for layer in (1, 3):
        assert torch.allclose(together.layers[layer][0, real], alone.layers[layer][0], atol=1e-5)
    assert_lengths(backbone, ["a b c", "d e f g h i j"])


def assert_lengths(backbone: Backbone, items: list[Any]) -> None:
    """As many tokens are counted of an item, alone or among others, as the model gives it."""
    for layer in range(backbone.layout.blocks + 1):
        given = [backbone([item], layers=[layer]).layers[layer].shape[1] for item in items]
        assert backbone.lengths(items, layer) == given
        assert [backbone.lengths([item], layer) for item in items] == [[length] for length in given]


def test_texts_are_counted_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load(str(tiny.bert(tmp_path)))
    monkeypatch.setattr(backbone, "states", None)
    assert backbone.lengths(["a b c", "d"], 0) == [5, 3]


@pytest.mark.parametrize("model", ["CLIPModel", "SiglipModel"])
def test_dual_encoders(tmp_path: Path, model: str) -> None:
    settings = {"text_config": tiny.TEXT, "vision_config": {**tiny.SMALL, **tiny.VISION}}
    folder = str(tiny.made(tmp_path, model, tiny.images, tiny.words, **settings))
    image, text = load(folder, "image"), load(folder, "text")
    assert image.identity.model_class == f"{model}.vision_model"
    assert image.layout.prefix_tokens == (1 if model == "CLIPModel" else 0)
    assert image([photo()]).layers[3].shape[1:] == (16 + image.layout.prefix_tokens, 32)
    assert text(["a b"]).layers[3].shape == (1, 4, 32)
    with pytest.raises(InputError, match=r"kind: .* takes image and text; name one"):
        load(folder)
    with pytest.raises(InputError, match="takes image and text, but the data are audio"):
        load(folder, "audio")


def test_a_text_model_without_a_mask_sees_its_own_padding(tmp_path: Path) -> None:
    settings = {"text_config": tiny.TEXT, "vision_config": {**tiny.SMALL, **tiny.VISION}}
    tiny.made(tmp_path, "SiglipModel", tiny.images, tiny.words, **settings)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": ["input_ids"]}))
    backbone = load(str(tmp_path), "text")
    prepared = backbone.prepare(["a b"])
    assert prepared.inputs["input_ids"].shape == (1, 32)
    states = backbone.states(prepared)
    assert states.mask is not None
    assert int(states.mask.sum()) == 4
    assert backbone.lengths(["a b", "a b c"], 0) == [4, 5]


@pytest.mark.parametrize("model", ["Wav2Vec2Model", "HubertModel", "WavLMModel"])
def test_waveforms(tmp_path: Path, model: str) -> None:
    backbone = load(str(tiny.made(tmp_path, model, tiny.waves(masked=True), feat_extract_norm="layer", **tiny.WAVES)))
    assert (backbone.layout.kind, backbone.layout.prefix_tokens, backbone.layout.grid) == ("audio", 0, None)
    assert not backbone.equal_sizes
    assert_no_mate_matters(backbone, tolerance=1e-4)
    assert_lengths(backbone, [(np.zeros(4000, np.float32), 16000), (np.zeros(9000, np.float32), 16000)])
    # WavLM writes its attention out, and is asked for it
    states = backbone([(np.zeros(4000, np.float32), 16000)], attentions=True)
    assert states.attentions is not None
    for weights in states.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_waveforms_without_a_mask_stay_among_their_like(tmp_path: Path) -> None:
    backbone = load(str(tiny.wav2vec2(tmp_path)))
    assert backbone.equal_sizes


def assert_no_mate_matters(backbone: Backbone, tolerance: float) -> None:
    rng = np.random.RandomState(0)
    short, long = (rng.randn(count).astype(np.float32) for count in (4000, 9000))
    alone = backbone([(short, 16000)]).layers[backbone.layout.blocks][0]
    together = backbone([(short, 16000), (long, 16000)])
    assert together.mask is not None
    assert torch.allclose(together.layers[backbone.layout.blocks][0, together.mask[0]], alone, atol=tolerance)


def test_spectrograms(tmp_path: Path) -> None:
    library = tiny.transformers()
    settings = {
        "vocab_size": 40, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 50,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    extractor = library.WhisperFeatureExtractor(chunk_length=1)
    backbone = load(str(tiny.made(tmp_path, "WhisperModel", extractor.save_pretrained, **settings)))
    assert backbone.identity.model_class == "WhisperModel.encoder"
    assert backbone.layout.tokens == (50, 50, 50)
    half = backbone([(np.zeros(8000, np.float32), 16000)])
    assert half.mask is not None
    assert int(half.mask.sum()) == 25
    assert backbone.lengths([(np.zeros(8000, np.float32), 16000)], 2) == [25]
    assert backbone.prepare([(np.zeros(20000, np.float32), 16000)]).cut == 1


def test_spectrogram_patches(tmp_path: Path) -> None:
    library = tiny.transformers()
    sizes = {"max_length": 64, "num_mel_bins": 32}
    extractor = library.ASTFeatureExtractor(**sizes)
    strides = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    backbone = load(str(tiny.made(tmp_path, "ASTModel", extractor.save_pretrained, **tiny.SMALL, **sizes, **strides)))
    assert (backbone.layout.prefix_tokens, backbone.layout.grid) == (2, (4, 8))


def test_sounds_are_brought_to_the_models_rate(tmp_path: Path) -> None:
    backbone = load(str(tiny.wav2vec2(tmp_path)))
    time = np.arange(44100) / 44100
    sound = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    assert backbone.prepare([(sound, 44100)]).inputs["input_values"].shape == (1, 16000)


def test_sentence_transformers_folder(tmp_path: Path) -> None:
    inner = tmp_path / "0_Transformer"
    tiny.bert(inner)
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (inner / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 6, "do_lower_case": True}))
    backbone = load(str(tmp_path))
    assert backbone.identity.library == "sentence-transformers"
    assert backbone.layout.preprocessing["max_length"] == 6
    prepared = backbone.prepare(["A B", "a b c d e f g"])
    assert prepared.inputs["input_ids"][0].tolist()[:4] == [2, 5, 6, 3]
    assert (prepared.inputs["input_ids"].shape[1], prepared.cut) == (6, 1)


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    expected = load(str(tmp_path))(["a b"]).layers[3]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model.bin only, a pickle.*--allow-pickle"):
        load(str(tmp_path))
    assert torch.equal(load(str(tmp_path), allow_pickle=True)(["a b"]).layers[3], expected)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="backbone:"):
        load(str(tmp_path), allow_pickle=True)
    assert not marker.exists()


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    marker = tmp_path / "ran"
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    with pytest.raises(InputError, match="--trust-remote-code"):
        load(str(tmp_path))
    assert not marker.exists()


def test_weights_that_are_not_in_the_file_are_told_and_the_same_each_time(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tiny.bert(tmp_path) / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if "layer.1.output.dense" not in k}
    save_file(kept, file, metadata={"format": "pt"})
    first, again = load(str(tmp_path)), load(str(tmp_path))
    assert "drawn at random: encoder.layer.1.output.dense.bias" in first.layout.notes[0]
    assert torch.equal(first(["a b"]).layers[3], again(["a b"]).layers[3])


def test_identity_follows_the_weights_not_the_place(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = (load(str(tiny.bert(tmp_path / name))).identity for name in "ab")
    assert (first.weights_sha256, first.config_sha256) == (second.weights_sha256, second.config_sha256)
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1
    save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    assert load(str(tmp_path / "b")).identity.weights_sha256 != first.weights_sha256


Broken = Callable[[Path], None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "a folder without config.json"),
        (lambda f: (f / "config.json").write_text("{"), "no JSON file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"123"), "backbone:"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no .safetensors file"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "does not say how images are prepared"),
    ],
)
def test_broken_folders_say_what_is_wrong(tmp_path: Path, change: Broken, message: str) -> None:
    change(tiny.vit(tmp_path))
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


def test_names_that_are_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="there is no folder"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="is no local folder, and was not found on the hub or in its cache"):
        load("nobody/no-such-model")


def test_other_arguments_are_checked(tmp_path: Path) -> None:
    folder = str(tiny.bert(tmp_path))
    for argument, message in (
        ({"kind": "smell"}, "kind: expected 'image', 'audio' or 'text', got 'smell'"),
        ({"precision": "int8"}, "precision: expected 'float32', 'bfloat16' or 'float16', got 'int8'"),
        ({"device": "nowhere"}, "device: 'nowhere' cannot be used"),
    ):
        with pytest.raises(InputError, match=message):
            load(folder, **argument)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layers: there is no layer 9"):
        load(folder)(["a"], layers=[9])


def test_timm_folder_without_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    tiny.vit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 0}))
    with pytest.raises(InputError, match="this is a timm model, and timm cannot be imported here"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "settings", "prefix", "grid"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 5}, 1, (4, 4)),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0, (4, 4)),
        ("vit_medium_patch16_reg4_gap_256", {}, 4, (4, 4)),
        ("deit_tiny_distilled_patch16_224", {}, 2, (4, 4)),
    ],
)
def test_timm_vits(
    tmp_path: Path, architecture: str, settings: dict[str, Any], prefix: int, grid: tuple[int, int]
) -> None:
    timm = tiny.timm()
    settings = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, **settings}
    made = timm.create_model(architecture, **settings).eval()
    timm.models.save_for_hf(made, tmp_path, model_args=settings, safe_serialization=True)
    backbone = load(str(tmp_path))
    layout = backbone.layout
    assert (layout.kind, layout.blocks, layout.prefix_tokens, layout.grid) == ("image", 3, prefix, grid)
    assert layout.heads == 2
    prepared = backbone.prepare([photo(), photo()])
    found = backbone.states(prepared, [1, 2, 3])
    blocks: list[torch.Tensor] = []
    for block in made.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: blocks.append(output))
    with torch.inference_mode():
        output = made.forward_features(prepared.inputs["x"])
    assert found.mask is None
    for number, expected in ((1, blocks[0]), (2, blocks[1]), (3, output)):
        assert torch.equal(found.layers[number], expected)


@pytest.mark.parametrize(
    ("architecture", "settings", "channels_last"),
    [
        ("resnet10t", {}, False),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2)}, True),
    ],
)
def test_timm_stages(tmp_path: Path, architecture: str, settings: dict[str, Any], channels_last: bool) -> None:
    timm = tiny.timm()
    made = timm.create_model(architecture, **settings).eval()
    timm.models.save_for_hf(made, tmp_path, model_args=settings, safe_serialization=True)
    backbone = load(str(tmp_path))
    layout = backbone.layout
    assert layout.prefix_tokens == 0
    assert layout.grid is not None
    assert layout.tokens[-1] == layout.grid[0] * layout.grid[1] < layout.tokens[1]
    prepared = backbone.prepare([photo()])
    found = backbone.states(prepared, [1, layout.blocks]).layers
    assert {n: tuple(state.shape[1:]) for n, state in found.items()} == {
        n: (layout.tokens[n], layout.dims[n]) for n in (1, layout.blocks)
    }
    with torch.inference_mode():
        output = made.forward_features(prepared.inputs["x"])
    expected = output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)
    assert torch.equal(found[layout.blocks], expected)


def test_half_precision(tmp_path: Path) -> None:
    backbone = load(str(tiny.vit(tmp_path)), precision="bfloat16")
    assert backbone([photo()]).layers[3].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tokens", "height", "width", "patch", "expected"),
    [
        (197, 224, 224, 16, (1, (14, 14))),
        (257, 224, 224, 14, (1, (16, 16))),
        (261, 224, 224, [14, 14], (5, (16, 16))),
        (198, 224, 224, None, (2, (14, 14))),
        (49, 224, 224, 4, (0, (7, 7))),
        (50, 224, 224, 32, (1, (7, 7))),
        (128, 128, 256, 16, (0, (8, 16))),
        (129, 128, 256, None, (1, (8, 16))),
        (1, 224, 224, None, (0, (1, 1))),
    ],
)
def test_grids(tokens: int, height: int, width: int, patch: Any, expected: Any) -> None:
    assert lie(tokens, height, width, patch)[:2] == expected


def test_tokens_without_a_grid_are_told() -> None:
    found = lie(1027, 30, 3000)
    assert found.grid is None
    assert found.note is not None
