"""A U-Net of diffusers beside a ControlNet: how one is made of it, and how both predict together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError

HIDDEN = -10_000.0
"""What diffusers adds to the score of a masked token."""


def controlnet_of(unet: Any, channels: int) -> Any:
    """A copy of the downward half of a U-Net that takes a condition of so many channels, at the size of the latents.

    Raises:
        InputError: where diffusers is not installed.
    """
    try:
        from diffusers import ControlNetModel
    except ImportError as error:
        raise InputError("controlnet: needs diffusers; install it with pip install 'cenote[diffusers]'") from error
    copy = ControlNetModel.from_unet(unet, conditioning_channels=channels)
    entrance = nn.Conv2d(channels, unet.config.block_out_channels[0], 3, padding=1)
    nn.init.zeros_(entrance.weight)
    assert entrance.bias is not None
    nn.init.zeros_(entrance.bias)
    copy.controlnet_cond_embedding = entrance
    return copy.requires_grad_(True)


def predicted(
    unet: Any,
    latents: Float[Tensor, "batch channels rows columns"],
    timestep: Int[Tensor, "batch"] | Int[Tensor, ""] | int,
    states: Float[Tensor, "batch tokens width"],
    mask: Bool[Tensor, "batch tokens"],
    controlnet: Any = None,
    condition: Float[Tensor, "batch condition rows columns"] | None = None,
) -> Float[Tensor, "batch channels rows columns"]:
    """What the U-Net predicts for noisy latents, told what the ControlNet finds in the condition.

    Args:
        unet: a diffusers `UNet2DConditionModel`.
        latents: noisy.
        timestep: of the diffusion.
        states: what the cross-attention reads.
        mask: True on its real tokens; the ControlNet heeds it too.
        controlnet: as `controlnet_of` makes it; `None`: the U-Net alone.
        condition: what the ControlNet is given.
    """
    reads: dict[str, Any] = {"encoder_hidden_states": states}
    down = mid = None
    if controlnet is not None:
        with _masked(controlnet, mask, states.dtype):
            down, mid = controlnet(latents, timestep, controlnet_cond=condition, return_dict=False, **reads)
    return unet(
        latents,
        timestep,
        encoder_attention_mask=mask,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
        **reads,
    )[0]


@contextmanager
def _masked(controlnet: Any, mask: Bool[Tensor, "batch tokens"], dtype: torch.dtype) -> Iterator[None]:
    """Cross-attention of the ControlNet that leaves masked tokens out, which its own call cannot be told."""
    bias = torch.where(mask, 0.0, HIDDEN).to(dtype).unsqueeze(1)
    blocks = [b for b in (*controlnet.down_blocks, controlnet.mid_block) if getattr(b, "has_cross_attention", False)]
    handles = [b.register_forward_pre_hook(partial(_told, bias), with_kwargs=True) for b in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _told(
    bias: Float[Tensor, "batch 1 tokens"], _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "encoder_attention_mask": bias}
