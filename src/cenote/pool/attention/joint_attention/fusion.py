from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of

FusionKind = Literal["mid", "early", "scalar_weight", "simple_average"]


class JointAttentionFusion(nn.Module):
    """Join the map of the people with that of an image.

    `"mid"`: each map through three 5 x 5 convolutions with ReLU (1 -> 4 -> 8 -> 8), side by side through two more (16 -> 8 ->
    8) and a 1 x 1; `"early"`: side by side from the start, through the last three; `"scalar_weight"`: softmax over two learned
    numbers; `"simple_average"`: their mean.

    Args:
        kind: as above; the authors use `"mid"`.
        sigmoid: whether the result passes a sigmoid, for training with binary cross-entropy.

    The scene's map is the mean of the image branch's maps of the real people, `mean_map`.

    Raises:
        InputError: where the kind is unknown or the maps differ in shape.

    Example:
        >>> JointAttentionFusion()(torch.rand(2, 1, 16, 32), torch.rand(2, 1, 16, 32)).shape
        torch.Size([2, 1, 16, 32])

    Source: Nakatani, Kawashima, Ukita, "Interaction-aware Joint Attention Estimation Using People Attributes", ICCV 2023.

    Note:
        The description of `"early"` that we have names it without its layers; these are ours.
    """

    def __init__(self, kind: FusionKind = "mid", sigmoid: bool = False) -> None:
        super().__init__()
        require_one_of(get_args(FusionKind), kind=kind)
        self.kind = kind
        self.sigmoid = sigmoid
        if kind == "mid":
            self.people, self.scene = _branch(), _branch()
        if kind in ("mid", "early"):
            self.final = nn.Sequential(
                _conv(16 if kind == "mid" else 2, 8), nn.ReLU(), _conv(8, 8), nn.ReLU(), nn.Conv2d(8, 1, 1)
            )
        if kind == "scalar_weight":
            self.weights = nn.Parameter(torch.zeros(2))

    def forward(
        self, people: Float[Tensor, "batch 1 height width"], scene: Float[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch 1 height width"]:
        """The joined map of the two branches."""
        if people.shape != scene.shape or people.dim() != 4 or people.shape[1] != 1:
            raise InputError(
                f"people, scene: expected two maps [batch, 1, height, width] of one shape, "
                f"got {tuple(people.shape)} and {tuple(scene.shape)}"
            )
        if self.kind == "mid":
            y = self.final(torch.cat([self.people(people), self.scene(scene)], 1))
        elif self.kind == "early":
            y = self.final(torch.cat([people, scene], 1))
        elif self.kind == "scalar_weight":
            w = self.weights.softmax(0)
            y = w[0] * people + w[1] * scene
        else:
            y = (people + scene) / 2
        return y.sigmoid() if self.sigmoid else y


def _conv(channels: int, to: int) -> nn.Conv2d:
    return nn.Conv2d(channels, to, 5, padding=2)


def _branch() -> nn.Sequential:
    return nn.Sequential(_conv(1, 4), nn.ReLU(), _conv(4, 8), nn.ReLU(), _conv(8, 8), nn.ReLU())
