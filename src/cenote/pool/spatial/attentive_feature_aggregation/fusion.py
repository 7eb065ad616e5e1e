from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.sets import as_tokens

Activation = Literal["sigmoid", "abs", "relu"]

REDUCTION = 16


class Gated(NamedTuple):
    """Two maps fused, and the gates.

    Attributes:
        output: `[batch, channels, height, width]`.
        spatial: `[batch, 1, height, width]`, read from the shallow map: where to trust it.
        channel: `[batch, channels, 1, 1]`, read from the deep map: what to trust it with.
    """

    output: Float[Tensor, "batch channels height width"]
    spatial: Float[Tensor, "batch 1 height width"]
    channel: Float[Tensor, "batch channels 1 1"]


class Layered(NamedTuple):
    """Several maps fused, and the weights of each.

    Attributes:
        output: `[batch, channels, height, width]`.
        spatial: `[batch, levels, height, width]`.
        channel: `[batch, levels, channels]`.
    """

    output: Float[Tensor, "batch channels height width"]
    spatial: Float[Tensor, "batch levels height width"]
    channel: Float[Tensor, "batch levels channels"]


class Rendered(NamedTuple):
    """Predictions of several scales fused, and the weight of each scale.

    Attributes:
        output: `[batch, classes, height, width]`.
        weights: `[batch, scales, height, width]`; on the grid of the densities they sum to `1 - exp(-sum_s y_s) < 1`.
    """

    output: Float[Tensor, "batch classes height width"]
    weights: Float[Tensor, "batch scales height width"]


class AFASpatialAttention(nn.Module):
    """One number per position: two 3 x 3 convolutions with normalisation and ReLU, then 1 x 1.

    Args:
        in_channels: of the map.
        out_channels: numbers per position.
        hidden: channels between; default `in_channels`.
        activation: `"sigmoid"`, or `"abs"` for scale-space rendering, or `"relu"`.

    Example:
        >>> AFASpatialAttention(16)(torch.randn(2, 16, 6, 5)).shape
        torch.Size([2, 1, 6, 5])

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023.
    """

    def __init__(
        self, in_channels: int, out_channels: int = 1, hidden: int | None = None, activation: Activation = "sigmoid"
    ) -> None:
        super().__init__()
        require_one_of(("sigmoid", "abs", "relu"), activation=activation)
        hidden = in_channels if hidden is None else hidden
        self.activation = activation
        self.inner = conv_norm_relu(in_channels, hidden, 3)
        self.outer = conv_norm_relu(hidden, hidden, 3)
        self.final = _kaiming(nn.Conv2d(hidden, out_channels, 1, bias=False))

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """The attention."""
        logits = self.logits(x)
        if self.activation == "sigmoid":
            return logits.sigmoid()
        return logits.abs() if self.activation == "abs" else logits.relu()

    def logits(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels height width"]:
        """What the activation gets."""
        return self.final(self.outer(self.inner(x)))


class AFAChannelAttention(nn.Module):
    """One number from 0 to 1 per channel, from the map's mean and its maximum.

    `sigmoid(f(mean) + f(max))`, `f` two 1 x 1 layers with `channels / reduction` between, normalisation and ReLU.

    Args:
        channels: of the map; at least `reduction`.
        reduction: channels of the map for each one between.

    Example:
        >>> AFAChannelAttention(32)(torch.randn(2, 32, 6, 5)).shape
        torch.Size([2, 32, 1, 1])

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023. The mask is ours.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        require_at_least(1, reduction=reduction)
        if channels < reduction:
            raise InputError(
                f"channels: expected at least {reduction}, of which one in {reduction} is kept, got {channels}; "
                f"give more or a smaller reduction="
            )
        self.squeeze = conv_norm_relu(channels, channels // reduction, 1)
        self.excite = _kaiming(nn.Conv2d(channels // reduction, channels, 1, bias=False))

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch channels 1 1"]:
        """The attention; with a mask, True on real positions, of those alone."""
        return self.logits(x, mask).sigmoid()

    def logits(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch channels 1 1"]:
        """What the sigmoid gets."""
        if self.training and x.shape[0] == 1:
            raise InputError(
                "x: batch normalisation of one vector per map cannot train on one map; give at least two per batch, or call "
                "eval() first"
            )
        tokens = as_tokens(x, mask)
        ends = [self.excite(self.squeeze(v[:, :, None, None])) for v in (tokens.mean(), tokens.max())]
        return ends[0] + ends[1]


class BinaryAFA(nn.Module):
    """Two maps become one: the shallow one says where, the deep one says what.

    `F = a_s (1 - a_c) S + (1 - a_s) a_c D` with `a_s` from the shallow map `S` and `a_c` from the deep map `D`.

    Args:
        channels: of both maps, which are of the same size.
        reduction: as of `AFAChannelAttention`.

    Example:
        >>> shallow, deep = torch.randn(2, 2, 16, 6, 5)
        >>> BinaryAFA(16)(shallow, deep).shape
        torch.Size([2, 16, 6, 5])

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        self.spatial = AFASpatialAttention(channels)
        self.channel = AFAChannelAttention(channels, reduction)

    def forward(
        self,
        shallow: Float[Tensor, "batch channels height width"],
        deep: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The fused map."""
        return self.attend(shallow, deep, mask).output

    def attend(
        self,
        shallow: Float[Tensor, "batch channels height width"],
        deep: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Gated:
        """As calling, and also both gates."""
        if shallow.shape != deep.shape:
            raise InputError(
                f"deep: expected the shape of shallow, {tuple(shallow.shape)}, got {tuple(deep.shape)}; project and enlarge it"
            )
        a_s, a_c = self.spatial(shallow), self.channel(deep, mask)
        return Gated(a_s * (1 - a_c) * shallow + (1 - a_s) * a_c * deep, a_s, a_c)


class MultiAFA(nn.Module):
    """Any number of maps become one, as layers that hide each other from fine to coarse.

    `F = sum_i w_i^spatial w_i^channel F_i`, `w_i = a_i prod_{j > i} (1 - a_j)` for both kinds of attention: the finest level
    stands in front.

    Args:
        channels: of the result, and of the finest level.
        coarser: channels of the other levels, coarse to fine; each is projected and enlarged. Default: all levels come with
            `channels`, and are only enlarged.
        reduction: as of `AFAChannelAttention`.

    Example:
        >>> coarse, fine = torch.randn(2, 24, 4, 4), torch.randn(2, 16, 8, 8)
        >>> MultiAFA(16, (24,))([coarse, fine]).shape
        torch.Size([2, 16, 8, 8])

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023.
    """

    def __init__(self, channels: int, coarser: Sequence[int] | None = None, reduction: int = REDUCTION) -> None:
        super().__init__()
        self.spatial = AFASpatialAttention(channels)
        self.channel = AFAChannelAttention(channels, reduction)
        self.projections = None if coarser is None else nn.ModuleList(conv_norm_relu(c, channels, 1) for c in coarser)

    def forward(
        self,
        levels: Sequence[Float[Tensor, "batch _channels _height _width"]],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The fused map of levels that go from coarse to fine; a mask is of the size of the finest."""
        return self.attend(levels, mask).output

    def attend(
        self,
        levels: Sequence[Float[Tensor, "batch _channels _height _width"]],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Layered:
        """As calling, and also the weights of each level."""
        if not levels or (self.projections is not None and len(levels) != len(self.projections) + 1):
            expected = "at least one" if self.projections is None else len(self.projections) + 1
            raise InputError(f"levels: expected {expected}, coarse to fine, got {len(levels)}")
        size = levels[-1].shape[2:]
        if self.projections is not None:
            levels = [*(project(x) for project, x in zip(self.projections, levels[:-1], strict=True)), levels[-1]]
        maps = [_enlarged(x, size) for x in levels]
        spatial = in_front([self.spatial(x) for x in maps])
        channel = in_front([self.channel(x, mask) for x in maps])
        parts = [s * c * x for s, c, x in zip(spatial, channel, maps, strict=True)]
        return Layered(
            torch.stack(parts).sum(0), torch.cat(spatial, 1), torch.stack([c.flatten(1) for c in channel], 1)
        )


def in_front(attentions: Sequence[Tensor]) -> list[Tensor]:
    """`w_i = a_i prod_{j > i} (1 - a_j)`: what is left of each level behind those that follow it.

    >>> [float(w) for w in in_front([torch.tensor(0.5), torch.tensor(0.5)])]
    [0.25, 0.5]
    """
    weights, seen = [], torch.ones_like(attentions[-1])
    for a in reversed(attentions):
        weights.append(a * seen)
        seen = seen * (1 - a)
    return weights[::-1]


def scale_space_rendering(
    predictions: Sequence[Float[Tensor, "batch classes height width"]],
    densities: Sequence[Float[Tensor, "batch 1 _height _width"]],
    normalise: bool = False,
) -> Rendered:
    """Fuse predictions of several image scales as a ray that passes them, the smallest image first.

    `w_s = (1 - exp(-y_s)) prod_{t < s} exp(-y_t)`, output `sum_s w_s p_s`, as volumes are rendered: `y` is a density, and
    what a scale is sure of hides the larger ones.

    Args:
        predictions: probabilities, scales ascending.
        densities: `y_s >= 0` of each, on a grid that may be smaller than the predictions: they are rendered there, and the
            weights enlarged bilinearly. Where they differ in size, the largest is the grid.
        normalise: whether the weights are divided by their sum, which is below 1 (the largest class stays the same).

    Raises:
        InputError: where there are not as many densities as predictions.

    Example:
        >>> p = [torch.full((1, 2, 1, 1), v) for v in (0.2, 0.8)]
        >>> y = [torch.full((1, 1, 1, 1), 2.0).log()] * 2
        >>> scale_space_rendering(p, y).weights.flatten().tolist()
        [0.5, 0.25]

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023.
    """
    if not predictions or len(predictions) != len(densities):
        raise InputError(
            f"densities: expected one for each of at least one prediction, got {len(densities)} for {len(predictions)}"
        )
    grid = max((y.shape[2:] for y in densities), key=math.prod)
    passed = torch.zeros_like(_enlarged(densities[0], grid))
    weights = []
    for y in (_enlarged(y, grid) for y in densities):
        weights.append(_enlarged(-torch.expm1(-y) * torch.exp(-passed), predictions[0].shape[2:]))
        passed = passed + y
    if normalise:
        total = torch.stack(weights).sum(0).clamp(min=torch.finfo(passed.dtype).tiny)
        weights = [w / total for w in weights]
    fused = torch.stack([w * p for w, p in zip(weights, predictions, strict=True)]).sum(0)
    return Rendered(fused, torch.cat(weights, 1))


def hierarchical_fusion(
    predictions: Sequence[Float[Tensor, "batch classes height width"]],
    attentions: Sequence[Float[Tensor, "batch 1 height width"]],
) -> Rendered:
    """Fuse predictions of several image scales pair by pair, from the largest image down: the rival of rendering.

    `q = p_S` of the largest scale, then `q <- a_s p_s + (1 - a_s) q` for each smaller one. The weights sum to 1.

    Args:
        predictions: probabilities, scales ascending.
        attentions: `a_s` from 0 to 1 of each, as `AFASpatialAttention` gives them; that of the largest scale is not read.

    Raises:
        InputError: where there are not as many attentions as predictions.

    Example:
        >>> p = [torch.full((1, 2, 1, 1), v) for v in (0.2, 0.6)]
        >>> fused = hierarchical_fusion(p, [torch.full((1, 1, 1, 1), 0.25)] * 2)
        >>> round(fused.output[0, 0].item(), 3), fused.weights.flatten().tolist()
        (0.5, [0.25, 0.75])

    Source: Tao, Sapra, Catanzaro, "Hierarchical Multi-Scale Attention for Semantic Segmentation", 2020; as a rival: Yang et
        al., WACV 2023.
    """
    if not predictions or len(predictions) != len(attentions):
        raise InputError(
            f"attentions: expected one for each of at least one prediction, got {len(attentions)} for {len(predictions)}"
        )
    # the smallest scale is fused last and so stands in front; behind all stands the largest
    weights = in_front([torch.ones_like(attentions[-1]), *reversed(attentions[:-1])])[::-1]
    fused = torch.stack([w * p for w, p in zip(weights, predictions, strict=True)]).sum(0)
    return Rendered(fused, torch.cat(weights, 1))


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution that keeps the size, batch normalisation, ReLU, started as the authors do.

    >>> conv_norm_relu(3, 8, 3)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    norm = nn.BatchNorm2d(out_channels)
    nn.init.uniform_(norm.weight)
    return nn.Sequential(_kaiming(conv), norm, nn.ReLU())


def _kaiming(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def _enlarged(x: Float[Tensor, "batch channels _height _width"], size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
