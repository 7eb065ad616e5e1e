"""Tiny models with random weights, one of each way of attention, and how each is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from tests import tiny
from torch import Tensor, nn
from torch.nn import functional as F

TEXT = {**tiny.TEXT, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
PIXELS = 32


class Case(NamedTuple):
    """A model and its inputs; `decoder` where it makes text with a cache."""

    model: nn.Module
    inputs: Mapping[str, Any]
    decoder: bool = False


def built(cls: str, settings: Mapping[str, Any], attention: str | None) -> nn.Module:
    library = tiny.transformers()
    kind = getattr(library, cls)
    config = kind.config_class(**settings)
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation=attention).eval()


def ids(batch: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(5, 38, (batch, tokens), generator=torch.Generator().manual_seed(1))


def pixels(size: int = PIXELS) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def text(cls: str, decoder: bool = False, **settings: Any) -> Callable[[str], Case]:
    return lambda attention: Case(built(cls, {**TEXT, **settings}, attention), {"input_ids": ids()}, decoder)


def seq2seq(cls: str, **settings: Any) -> Callable[[str], Case]:
    def make(attention: str) -> Case:
        inputs = {"input_ids": ids(tokens=7), "decoder_input_ids": ids(tokens=5)}
        return Case(built(cls, settings, attention), inputs)

    return make


def vision(cls: str, **settings: Any) -> Callable[[str], Case]:
    settings = {**tiny.SMALL, **tiny.VISION, **settings}
    return lambda attention: Case(built(cls, settings, attention), {"pixel_values": pixels()})


def clip(attention: str) -> Case:
    settings = {
        "text_config": {**TEXT, "hidden_size": 32, "eos_token_id": 2},
        "vision_config": {**tiny.SMALL, **tiny.VISION},
        "projection_dim": 16,
    }
    return Case(built("CLIPModel", settings, attention), {"input_ids": ids(), "pixel_values": pixels()})


def siglip(attention: str) -> Case:
    settings = {"text_config": {**TEXT, "projection_size": 32}, "vision_config": {**tiny.SMALL, **tiny.VISION}}
    return Case(built("SiglipModel", settings, attention), {"input_ids": ids(), "pixel_values": pixels()})


def whisper(attention: str) -> Case:
    settings = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20,
        "max_target_positions": 20, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    waves = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
    inputs = {"input_features": waves, "decoder_input_ids": ids(tokens=5)}
    return Case(built("WhisperModel", settings, attention), inputs)


def wav2vec2(attention: str) -> Case:
    waves = torch.randn(2, 2000, generator=torch.Generator().manual_seed(1))
    return Case(built("Wav2Vec2Model", tiny.WAVES, attention), {"input_values": waves})


def llava(attention: str) -> Case:
    settings = {
        "text_config": {"model_type": "llama", **GROUPED},
        "vision_config": {"model_type": "clip_vision_model", **tiny.SMALL, **tiny.VISION},
        "image_token_id": 39,
        "vision_feature_layer": -1,
    }
    words = torch.cat([ids(tokens=3), torch.full((2, 16), 39), ids(tokens=4)], 1)
    return Case(
        built("LlavaForConditionalGeneration", settings, attention),
        {"input_ids": words, "pixel_values": pixels()},
        decoder=True,
    )


def qwen2_vl(attention: str) -> Case:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    settings = {
        "text_config": {**GROUPED, "rope_parameters": rope},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2},
        "image_token_id": 39, "vision_start_token_id": 38, "video_token_id": 37, "vision_end_token_id": 36,
    }  # fmt: skip
    words = torch.cat(
        [ids(tokens=3).clamp(max=30), torch.full((2, 1), 38), torch.full((2, 4), 39), ids(tokens=3).clamp(max=30)], 1
    )
    patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return Case(
        built("Qwen2VLForConditionalGeneration", settings, attention),
        {
            "input_ids": words,
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "mm_token_type_ids": (words == 39).int(),
        },
    )


class OwnAttention(nn.Module):
    """As timm writes it: torch's function is called in the module itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


class OwnBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn, self.norm = OwnAttention(dim, heads), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class OwnViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.Sequential(*[OwnBlock(32, 4) for _ in range(3)])
        self.norm = nn.LayerNorm(32)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.patch_embed(images).flatten(2).mT))


def own(_: str) -> Case:
    torch.manual_seed(0)
    return Case(OwnViT().eval(), {"images": pixels()})


def timm(_: str) -> Case:
    torch.manual_seed(0)
    model = tiny.timm_models().create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, pretrained=False
    )
    return Case(model.eval(), {"x": pixels()})


def timm_swin(_: str) -> Case:
    torch.manual_seed(0)
    settings = {"window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}
    model = tiny.timm_models().create_model("swin_tiny_patch4_window7_224", img_size=32, pretrained=False, **settings)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return Case(model.eval(), {"x": pixels()})


def torch_encoder(_: str) -> Case:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return Case(model, {"src": torch.randn(2, 6, 32), "src_key_padding_mask": padding})


def diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="cenote[diffusers] is not installed")


def unet(_: str) -> Case:
    torch.manual_seed(0)
    model = diffusers().UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    return Case(
        model, {"sample": torch.randn(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(2, 5, 12)}
    )


def dit(_: str) -> Case:
    torch.manual_seed(0)
    model = diffusers().DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2,
        norm_num_groups=4, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 2]),
    }
    return Case(model, inputs)


def flux(_: str) -> Case:
    torch.manual_seed(0)
    model = diffusers().FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
        pooled_projection_dim=6, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    return Case(
        model,
        {
            "hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 3, 12),
            "pooled_projections": torch.randn(1, 6), "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3),
        },
    )  # fmt: skip


def old() -> bool:
    """Whether "eager" attention is a function of each model's own file, and not asked of the registry, as in 5.0."""
    return not hasattr(tiny.transformers().AttentionInterface, "get_interface")


T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 40,
    "decoder_start_token_id": 0,
}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 40, "max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {**GROUPED, "head_dim": 8}
GPT_OSS = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}

MODELS: dict[str, Callable[[str], Case]] = {
    "llama": text("LlamaForCausalLM", True, num_key_value_heads=2),
    "qwen2": text("Qwen2ForCausalLM", True, num_key_value_heads=2),
    "qwen3": text("Qwen3ForCausalLM", True, num_key_value_heads=2, head_dim=8),
    "gemma2": text("Gemma2ForCausalLM", True, **GEMMA, sliding_window=4, attn_logit_softcapping=0.5),
    "gemma3": text(
        "Gemma3ForCausalLM", True, **GEMMA, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
    "mistral": text("MistralForCausalLM", True, num_key_value_heads=2, sliding_window=4),
    "mixtral": text("MixtralForCausalLM", True, num_key_value_heads=2, num_local_experts=2),
    "gpt_oss": text("GptOssForCausalLM", True, **GPT_OSS),
    "gpt2": text("GPT2LMHeadModel", True, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
    "gpt_neox": text("GPTNeoXForCausalLM", True),
    "phi": text("PhiForCausalLM", True),
    "bloom": text("BloomForCausalLM", False, n_layer=2, n_head=4),
    "bert": text("BertModel"),
    "bert_decoder": text("BertLMHeadModel", True, is_decoder=True),
    "roberta": text("RobertaModel"),
    "albert": text("AlbertModel", embedding_size=16),
    "t5": seq2seq("T5Model", **T5),
    "bart": seq2seq("BartModel", **BART),
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "vit": vision("ViTModel"),
    "dinov2": vision("Dinov2WithRegistersModel", num_register_tokens=2),
    "clip": clip,
    "siglip": siglip,
    "swin": lambda attention: Case(
        built(
            "SwinModel",
            {
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 4,
            },
            attention,
        ),
        {"pixel_values": pixels()},
    ),
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "own": own,
    "timm": timm,
    "timm_swin": timm_swin,
    "torch": torch_encoder,
    "unet": unet,
    "dit": dit,
    "flux": flux,
}
OF_ONE_KIND = ("own", "timm", "timm_swin", "torch", "unet", "dit", "flux")
"""Not of transformers: they call torch's function themselves."""
EAGER_ONLY = ("gemma2", "gpt_oss")
WRITTEN_OUT = ("bloom",)
OLD_WRITTEN_OUT = ("t5", "swin")
"""In transformers 5.0."""
REACHED = [
    (name, attention)
    for name in MODELS
    for attention in ("sdpa", "eager")
    if name not in WRITTEN_OUT
    and not (name in OLD_WRITTEN_OUT and old())
    and not (attention == "sdpa" and name in EAGER_ONLY)
    and not (attention == "eager" and name in OF_ONE_KIND)
]


def one_by_one(cases: Iterable[tuple[str, str]]) -> list[Any]:
    """Models and implementations as parameters; a model's second implementation is thorough."""
    seen: set[str] = set()
    found = []
    for name, attention in cases:
        marks = (pytest.mark.thorough("a model under its second implementation"),) if name in seen else ()
        found.append(pytest.param(name, attention, marks=marks))
        seen.add(name)
    return found


def tensors(output: Any) -> list[Tensor]:
    """All that a model gave, caches left out."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = [value for name, value in output.items() if name != "past_key_values"]
    return [tensor for value in output for tensor in tensors(value)] if isinstance(output, (list, tuple)) else []
