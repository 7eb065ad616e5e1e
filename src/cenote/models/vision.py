"""Image encoders of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cenote.models.base import Identity, Kind, Prepared
from cenote.models.grids import lie
from cenote.models.hugging_face import HuggingFaceBackbone, plain, processor

SAMPLE = (320, 240)


def preparing(processor: object) -> tuple[str, ...]:
    """The libraries that a processor prepares with, besides PIL."""
    by_torchvision = getattr(processor, "backend", None) == "torchvision" or type(processor).__name__.endswith("Fast")
    return ("torchvision",) if by_torchvision else ()


class VisionBackbone(HuggingFaceBackbone):
    """Tokens of an image: patches row by row, after [CLS], registers and a distillation token where the model has them.

    Args:
        model: takes `pixel_values`.
        folder: with the image processor's settings.
        identity: which model.
        notes: on loading.
        trust_remote_code: allow a processor's own code.
    """

    def __init__(
        self, model: nn.Module, folder: Path, identity: Identity, notes: Sequence[str], trust_remote_code: bool
    ) -> None:
        self.processor = processor("AutoImageProcessor", folder, trust_remote_code, "images")
        self.libraries = preparing(self.processor)
        config: Any = model.config
        if getattr(config, "mask_ratio", 0):
            # a masked autoencoder hides most of its input also when it only encodes; here it sees everything
            config.mask_ratio = 0.0
        super().__init__(model, identity, notes)

    def kind(self) -> Kind:
        return "image"

    def sample(self) -> tuple[Any, str]:
        from PIL import Image

        noise = np.random.RandomState(0).randint(0, 256, (SAMPLE[1], SAMPLE[0], 3), dtype=np.uint8)
        return Image.fromarray(noise), f"an image of {SAMPLE[0]} x {SAMPLE[1]} pixels"

    def prepare(self, items: Sequence[Any]) -> Prepared:
        """Resized, cropped and normalised as the model's own settings say."""
        inputs = dict(self.processor(images=list(items), return_tensors="pt"))
        if "noise" in self.takes and not getattr(self.config, "mask_ratio", 1):
            patch = self.config.patch_size
            patches = inputs["pixel_values"].shape[-2] // patch * (inputs["pixel_values"].shape[-1] // patch)
            # rising noise keeps the order of the patches
            inputs["noise"] = torch.arange(patches, dtype=torch.float32).expand(len(items), -1)
        return Prepared(inputs)

    def mask(self, prepared: Prepared, output: Any) -> Tensor | None:
        mask = prepared.inputs.get("pixel_attention_mask")
        tokens = output.last_hidden_state.shape[1]
        if mask is None or mask.shape[1:] != (tokens,):
            return None
        return mask.bool().to(self.device)

    def lie(self, prepared: Prepared, tokens: int) -> tuple[int, tuple[int, int] | None]:
        pixels = prepared.inputs["pixel_values"]
        if pixels.dim() != 4:
            self.notes.append("its preprocessing cuts the patches itself: no grid is known")
            return 0, None
        found = lie(tokens, pixels.shape[2], pixels.shape[3], getattr(self.config, "patch_size", None))
        if found.note:
            self.notes.append(found.note)
        return found.prefix_tokens, found.grid

    def settings(self) -> Mapping[str, Any]:
        return plain({"processor": type(self.processor).__name__, **self.processor.to_dict()})
