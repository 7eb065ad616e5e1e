"""Other ways to fuse two maps, in the place of `BinaryAFA`: what attentive aggregation is compared with."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.requirements import require_one_of
from cenote.pool.spatial.attentive_feature_aggregation.fusion import (
    REDUCTION,
    AFAChannelAttention,
    AFASpatialAttention,
    conv_norm_relu,
)

Attention = Literal["spatial", "channel", "swapped"]


class SumFusion(nn.Module):
    """`F = S + D`.

    >>> SumFusion(2)(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)).unique().item()
    2.0
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(
        self, shallow: Float[Tensor, "batch channels height width"], deep: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The fused map."""
        return shallow + deep


class ConcatenationFusion(nn.Module):
    """Both maps side by side through one convolution: 1 x 1 as usual, 3 x 3 with about as many parameters as `BinaryAFA`.

    >>> ConcatenationFusion(4)(torch.ones(2, 4, 3, 3), torch.ones(2, 4, 3, 3)).shape
    torch.Size([2, 4, 3, 3])
    """

    def __init__(self, channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.fuse = conv_norm_relu(2 * channels, channels, kernel_size)

    def forward(
        self, shallow: Float[Tensor, "batch channels height width"], deep: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The fused map."""
        return self.fuse(torch.cat([shallow, deep], 1))


class PartialAFA(nn.Module):
    """`BinaryAFA` with one of its attentions alone, or with both in the other's place.

    Spatial alone: `F = a_s S + (1 - a_s) D`, `a_s` from `S`. Channel alone: `F = (1 - a_c) S + a_c D`, `a_c` from `D`. Swapped:
    `F = a_c (1 - a_s) S + (1 - a_c) a_s D`, with `a_c` from `S` and `a_s` from `D`.

    Args:
        channels: of both maps.
        attention: which.
        reduction: as of `AFAChannelAttention`.

    Example:
        >>> PartialAFA(16, "spatial")(*torch.randn(2, 2, 16, 6, 5)).shape
        torch.Size([2, 16, 6, 5])

    Source: the ablations of Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023; that the remaining
        weights sum to 1 is ours.
    """

    def __init__(self, channels: int, attention: Attention, reduction: int = REDUCTION) -> None:
        super().__init__()
        require_one_of(("spatial", "channel", "swapped"), attention=attention)
        self.attention = attention
        self.spatial = None if attention == "channel" else AFASpatialAttention(channels)
        self.channel = None if attention == "spatial" else AFAChannelAttention(channels, reduction)

    def forward(
        self, shallow: Float[Tensor, "batch channels height width"], deep: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The fused map."""
        if self.channel is None:
            assert self.spatial is not None
            return deep + self.spatial(shallow) * (shallow - deep)
        if self.spatial is None:
            return shallow + self.channel(deep) * (deep - shallow)
        a_c, a_s = self.channel(shallow), self.spatial(deep)
        return a_c * (1 - a_s) * shallow + (1 - a_c) * a_s * deep


class LevelSoftmax(nn.Module):
    """Levels fused by weights that sum to 1 at each place: a softmax over levels of one score per place.

    Args:
        channels: of all levels, which are of one size.

    Example:
        >>> LevelSoftmax(16)([torch.randn(2, 16, 4, 4) for _ in range(3)]).shape
        torch.Size([2, 16, 4, 4])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = AFASpatialAttention(channels)

    def forward(
        self, levels: list[Float[Tensor, "batch channels height width"]]
    ) -> Float[Tensor, "batch channels height width"]:
        """The fused map."""
        weights = torch.stack([self.score.logits(x) for x in levels]).softmax(0)
        return (weights * torch.stack(levels)).sum(0)
