"""What networks of feature maps `[batch, dim, rows, columns]` are built of, besides what mixes their cells."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.requirements import require_one_of, require_rate
from cenote.mix.base import GridMixer, Mixer

NORMS = ("group", "layer", "batch", "none")


def on_map(
    mixer: nn.Module,
    x: Float[Tensor, "batch dim rows columns"],
    real: Bool[Tensor, "batch rows columns"] | None = None,
) -> Float[Tensor, "batch dim rows columns"]:
    """Mix the cells of a feature map.

    Args:
        mixer: a `GridMixer`, whose `grid` does not count here; another `Mixer`, for which the cells are tokens, row by row; or
            any module on feature maps, which is not told what is real.
        x: the map.
        real: False where an image has no cell; None for all.
    """
    if isinstance(mixer, GridMixer):
        if real is None:
            return mixer.mix_grid(x, x.new_ones(x.shape[:1] + x.shape[2:], dtype=torch.bool))
        keep = real.unsqueeze(1)
        return mixer.mix_grid(x.masked_fill(~keep, 0.0), real).masked_fill(~keep, 0.0)
    if isinstance(mixer, Mixer):
        mixed = mixer(x.flatten(2).transpose(1, 2), None if real is None else real.flatten(1))
        return mixed.transpose(1, 2).unflatten(-1, x.shape[2:])
    return mixer(x)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelRMSNorm(nn.RMSNorm):
    """RMSNorm over the channels of each cell."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps)

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm_of(name: str, dim: int) -> nn.Module:
    """A normalisation by its word: `"group"` over channels and cells of each image, `"layer"` over the channels of each cell,
    `"batch"`, `"none"`.

    Raises:
        InputError: for another word.
    """
    require_one_of(NORMS, norm=name)
    if name == "group":
        return nn.GroupNorm(1, dim)
    if name == "layer":
        return ChannelLayerNorm(dim)
    return nn.BatchNorm2d(dim) if name == "batch" else nn.Identity()


class DropPath(nn.Module):
    """In training a branch is left out of some items, and counts the more in the others: stochastic depth.

    Args:
        rate: share of the items that go without it.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        require_rate(rate=rate)
        self.rate = rate

    def forward(self, branch: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        if not self.rate or not self.training:
            return branch
        kept = torch.rand([len(branch), *[1] * (branch.dim() - 1)], device=branch.device) >= self.rate
        return branch * kept / (1 - self.rate)


def drop_rates(rate: float, blocks: int) -> list[float]:
    """Rates of stochastic depth that grow evenly from 0 in the first block to `rate` in the last.

    >>> drop_rates(0.5, 3)
    [0.0, 0.25, 0.5]
    """
    return [rate * i / max(blocks - 1, 1) for i in range(blocks)]


def start_narrow(module: nn.Module, std: float = 0.02) -> None:
    """Weights of matrices and convolutions from a normal distribution cut at 2, of this deviation; their biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
