"""Models of timm, as they are built: what is reached, and what is not says so at entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny
from tests.models.live import zoo
from torch import Tensor, nn

from cenote.core import InputError
from cenote.models.live import AblatedHeads, AddedStates, Where, attentions, edited, recorded, stacks

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 4}
PATCHES = {"img_size": 32, "patch_size": 8, **SMALL}
WINDOWS = {"img_size": 32, "window_size": 4, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}
REACHED = {
    "vit_tiny_patch16_224": (PATCHES, 17),
    "vit_small_patch14_reg4_dinov2": ({**PATCHES, "patch_size": 16}, 9),
    "deit_tiny_distilled_patch16_224": (PATCHES, 18),
    "beit_base_patch16_224": (PATCHES, 17),
    "eva02_tiny_patch14_224": (PATCHES, 17),
    "vit_base_patch16_siglip_224": (PATCHES, 16),
}
REFUSED = {
    "cait_xxs24_224": (PATCHES, "blocks.0.attn cannot be reached: TalkingHeadAttn writes it out", 4),
    "xcit_nano_12_p16_224": (
        {**PATCHES, "patch_size": 16},
        "blocks.0.attn cannot be reached: its attention is written",
        4,
    ),
    "swin_tiny_patch4_window7_224": (WINDOWS, "blocks.0.attn cannot be reached: its attention is written out", 4),
    "swinv2_tiny_window8_256": (WINDOWS, "blocks.0.attn cannot be reached: WindowAttention writes it out", 4),
}


def built(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return tiny.timm_models().create_model(name, pretrained=False, num_classes=3, **settings).eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(zoo.pixels())


@pytest.mark.parametrize("name", REACHED)
def test_maps_heads_and_states_are_there(name: str) -> None:
    settings, tokens = REACHED[name]
    model = built(name, **settings)
    plain = run(model)
    with recorded(model, "rows", "heads", "inputs", "states", rows="all") as found:
        assert torch.equal(run(model), plain)
    assert found["rows"].stack().shape == (2, 2, 4, tokens, tokens)
    assert found["states"].stack().shape == (2, 2, tokens, 32)
    for place in attentions(model):
        made = found["inputs"][place][0].mixed(found["rows"][place][0])
        assert torch.allclose(made, found["heads"][place][0], atol=1e-5)
    for edit in (AblatedHeads([(0, 1)]), AddedStates({1: torch.ones(32)})):
        with edited(model, edit):
            assert not torch.equal(run(model), plain)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_is_written_out_is_refused_and_states_are_there(name: str) -> None:
    settings, why, blocks = REFUSED[name]
    model = built(name, **settings)
    plain = run(model)
    with pytest.raises(InputError, match=why), recorded(model, "rows"):
        pytest.fail("entered")
    with recorded(model, "states") as found:
        assert torch.equal(run(model), plain)
    assert len(found["states"]) == sum(stacks(model).values()) == blocks


def test_attention_of_the_class_token_is_reached_beside_what_is_not() -> None:
    for name, stack, keys in (
        ("cait_xxs24_224", "blocks_token_only", 17),
        ("xcit_nano_12_p16_224", "cls_attn_blocks", 5),
    ):
        model = built(name, **REFUSED[name][0])
        plain = run(model)
        with recorded(model, "rows", at=Where(stack=stack), rows="all") as found:
            assert torch.equal(run(model), plain)
        assert found["rows"].stack().shape == (2, 2, 4, 1, keys)


def test_attention_among_channels_is_no_attention_among_tokens() -> None:
    model = built("xcit_nano_12_p16_224", **REFUSED["xcit_nano_12_p16_224"][0])
    for block in model.blocks:
        block.attn.fused_attn = True
    with (
        pytest.raises(InputError, match=r"blocks.0.attn attends among its 32 channels, not among tokens"),
        recorded(model, "rows", at=Where(stack="blocks")),
    ):
        run(model)


def test_a_model_without_attention_says_so() -> None:
    model = built("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    for wanted, recorder in (("rows", "RowRecorder"), ("states", "StateRecorder")):
        with (
            pytest.raises(InputError, match=f"{recorder} acts in attention.*ConvNeXt has none"),
            recorded(model, wanted),
        ):
            pytest.fail("entered")
