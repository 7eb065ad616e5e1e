"""The skeleton: norm, mixer, skip, norm, perceptron, skip.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.mix.maps import DropPath, norm_of, on_map

Activation = Callable[[], nn.Module]


class ChannelMLP(nn.Module):
    """`W_2 act(W_1 x)` at each cell.

    Args:
        dim: width of a cell.
        hidden: width between.
        act: builds the activation.
        drop: dropout behind it and behind the output.
    """

    def __init__(self, dim: int, hidden: int, act: Activation = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class MetaFormerBlock(nn.Module):
    """`x = x + s_1 * mixer(norm_1(x))`, `x = x + s_2 * MLP(norm_2(x))`, with a factor per channel in `s_1`, `s_2`.

    Args:
        dim: width of a cell.
        mixer: what `on_map` takes: any mixer of `cenote.mix`, or a module on feature maps.
        ratio: of the perceptron's hidden width to the outer.
        norm: `"group"`, `"layer"`, `"batch"` or `"none"`.
        act: builds the perceptron's activation.
        drop: dropout in the perceptron.
        drop_path: share of images that go without a branch, in training.
        layer_scale: first value of the factors; None for none.
        skip: whether what goes in is added; False for the ablation without.
        mlp: whether there is a perceptron; False for the ablation without.

    Source:
        Yu et al. 2022, arXiv 2111.11418, section 3.1. Parameters carry the names of the authors' code.
    """

    layer_scale_1: nn.Parameter | None
    layer_scale_2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        ratio: float = 4.0,
        norm: str = "group",
        act: Activation = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-5,
        skip: bool = True,
        mlp: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = norm_of(norm, dim)
        self.token_mixer = mixer
        self.norm2 = norm_of(norm, dim) if mlp else None
        self.mlp = ChannelMLP(dim, int(dim * ratio), act, drop) if mlp else None
        self.drop_path = DropPath(drop_path)
        self.skip = skip
        scales = (None, None) if layer_scale is None else (torch.full((dim,), layer_scale),) * 2
        for i, scale in enumerate(scales, 1):
            self.register_parameter(f"layer_scale_{i}", None if scale is None else nn.Parameter(scale.clone()))

    def forward(
        self,
        x: Float[Tensor, "batch dim rows columns"],
        real: Bool[Tensor, "batch rows columns"] | None = None,
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The next feature map.

        Args:
            x: a feature map.
            real: False where an image has no cell, for the mixer; None for all. Norms over cells see all of them.
        """
        x = self._joined(x, on_map(self.token_mixer, self.norm1(x), real), self.layer_scale_1)
        if self.mlp is None or self.norm2 is None:
            return x
        return self._joined(x, self.mlp(self.norm2(x)), self.layer_scale_2)

    def _joined(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        branch = self.drop_path(branch if scale is None else scale.view(-1, 1, 1) * branch)
        return x + branch if self.skip else branch
