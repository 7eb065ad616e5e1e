from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive, require_at_least, require_one_of
from cenote.pool.spatial.attentive_feature_aggregation.fusion import (
    AFASpatialAttention,
    BinaryAFA,
    MultiAFA,
    Rendered,
    conv_norm_relu,
    hierarchical_fusion,
    scale_space_rendering,
)
from cenote.pool.spatial.attentive_feature_aggregation.rmi import rmi_loss

FUSED = 3
LEAST = 1e-8

Level = Float[Tensor, "batch _channels _height _width"]
Fuse = Callable[[int], nn.Module]


class AFAIDAUp(nn.Module):
    """One node of iterative deep aggregation: deeper maps are fused into a shallow one, one after the other.

    `x_0 = layer_0`, `x_i = fuse(shallow = x_{i-1}, deep = up(project(layer_i)))`.

    Args:
        channels: of the layers, fine to coarse.
        up_factors: by how much each layer is enlarged, learned from bilinear weights on; 1 leaves it.
        out_channels: of the result; default those of the first layer. Layers with others are projected.
        fuse: what builds the fusion of two maps of so many channels, called with the shallow and the deep one.

    Example:
        >>> node = AFAIDAUp((16, 24), (1, 2))
        >>> [y.shape for y in node([torch.randn(2, 16, 8, 8), torch.randn(2, 24, 4, 4)])]
        [torch.Size([2, 16, 8, 8])]

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023, after Yu et al., "Deep Layer
        Aggregation", CVPR 2018.
    """

    def __init__(
        self,
        channels: Sequence[int],
        up_factors: Sequence[int],
        out_channels: int | None = None,
        fuse: Fuse = BinaryAFA,
    ) -> None:
        super().__init__()
        if len(channels) < 2 or len(up_factors) != len(channels) or min(up_factors) < 1:
            raise InputError(
                f"up_factors: expected one positive factor for each of at least two layers, "
                f"got {tuple(up_factors)} for channels {tuple(channels)}"
            )
        out = channels[0] if out_channels is None else out_channels
        self.projections = nn.ModuleList(nn.Identity() if c == out else conv_norm_relu(c, out, 1) for c in channels)
        self.enlarge = nn.ModuleList(nn.Identity() if f == 1 else bilinear_up(out, f) for f in up_factors)
        self.fuse = nn.ModuleList(fuse(out) for _ in channels[1:])

    def forward(self, layers: Sequence[Level]) -> list[Float[Tensor, "batch out height width"]]:
        """The map after each fusion; the last is the result."""
        if len(layers) != len(self.projections):
            raise InputError(f"layers: expected {len(self.projections)}, fine to coarse, got {len(layers)}")
        maps = [up(project(x)) for up, project, x in zip(self.enlarge, self.projections, layers, strict=True)]
        x, every = maps[0], []
        for fuse, deep in zip(self.fuse, maps[1:], strict=True):
            x = fuse(x, deep)
            every.append(x)
        return every


class AFADLAUp(nn.Module):
    """A feature pyramid becomes one fine map: nodes from deep to shallow, then the finest three fused at once.

    Each `AFAIDAUp` node takes the next shallower map of the pyramid and all that the node before it made; `MultiAFA` fuses
    the results of the last nodes.

    Args:
        channels: of the pyramid, fine to coarse.
        scales: how much coarser than the first each map is; default 1, 2, 4, ...
        fuse: of two maps, as in `AFAIDAUp`.
        fused: how many nodes' results are fused at the end.

    Example:
        >>> pyramid = [torch.randn(2, c, s, s) for c, s in ((16, 16), (24, 8), (32, 4))]
        >>> AFADLAUp((16, 24, 32))(pyramid).shape
        torch.Size([2, 16, 16, 16])

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023.
    """

    def __init__(
        self,
        channels: Sequence[int],
        scales: Sequence[int] | None = None,
        fuse: Fuse = BinaryAFA,
        fused: int = FUSED,
    ) -> None:
        super().__init__()
        given = [2**i for i in range(len(channels))] if scales is None else list(scales)
        if len(channels) < 2 or len(given) != len(channels) or any(b % a for a, b in itertools.pairwise(given)):
            raise InputError(
                f"scales: expected one for each of at least two maps, each a multiple of the one before, got {given} for "
                f"channels {tuple(channels)}"
            )
        require_at_least(1, fused=fused)
        nodes, have, at = [], list(channels), list(given)
        for j in range(len(channels) - 2, -1, -1):
            nodes.append(AFAIDAUp(have[j:], [s // at[j] for s in at[j:]], fuse=fuse))
            behind = len(channels) - j - 1
            have[j + 1 :], at[j + 1 :] = [have[j]] * behind, [at[j]] * behind
        self.nodes = nn.ModuleList(nodes)
        # the node of the map j has its channels
        self.out_channels = tuple(reversed(channels[:-1]))
        self.last = MultiAFA(channels[0], self.out_channels[-fused:-1])

    def forward(self, pyramid: Sequence[Level]) -> Float[Tensor, "batch channels height width"]:
        """The fused map, at the size of the pyramid's first."""
        return self.fused(self.by_node(pyramid))

    def by_node(self, pyramid: Sequence[Level]) -> list[Level]:
        """The result of each node, coarse to fine, of `out_channels` channels; auxiliary heads read these."""
        if len(pyramid) != len(self.nodes) + 1:
            raise InputError(f"pyramid: expected {len(self.nodes) + 1} maps, fine to coarse, got {len(pyramid)}")
        layers, results = list(pyramid), []
        for i, node in enumerate(self.nodes):
            made = node(layers[-i - 2 :])
            layers[-i - 1 :] = made
            results.append(made[-1])
        return results

    def fused(self, by_node: Sequence[Level]) -> Float[Tensor, "batch channels height width"]:
        """The last nodes' results as one map."""
        count = 1 if self.last.projections is None else len(self.last.projections) + 1
        return self.last(by_node[-count:])


class Segmented(NamedTuple):
    """What `AFASegmenter` says of images.

    Attributes:
        output: `[batch, classes, height, width]`, the fused probabilities.
        by_scale: `[batch, scales, classes, height, width]`, each scale's own.
        auxiliary: `[batch, heads, classes, height, width]`, of the heads on each node, fused by the same weights.
        weights: `[batch, scales, height, width]`.
    """

    output: Float[Tensor, "batch classes height width"]
    by_scale: Float[Tensor, "batch scales classes height width"]
    auxiliary: Float[Tensor, "batch heads classes height width"]
    weights: Float[Tensor, "batch scales height width"]


class _Scale(NamedTuple):
    factor: float
    features: Float[Tensor, "batch channels _height _width"]
    nodes: list[Level]


class AFASegmenter(nn.Module):
    """Attentive aggregation of a feature pyramid at several image scales, which scale-space rendering fuses.

    Args:
        backbone: images to a pyramid, fine to coarse.
        channels: of the pyramid.
        classes: number of classes.
        scales: of the image in training, (0.5, 1); in evaluation the paper takes (0.5, 1, 1.5, 1.75, 2).
        levels: as `scales` of `AFADLAUp`.
        fusion: of the scales: `"rendering"`, see `scale_space_rendering`, or its rival `"hierarchical"`, see
            `hierarchical_fusion`. Their average and maximum are those of `by_scale` of `at_scales`.

    Example:
        >>> class Backbone(torch.nn.Module):
        ...     def forward(self, x):
        ...         return [torch.nn.functional.avg_pool2d(x, s) for s in (1, 2, 4)]
        >>> net = AFASegmenter(Backbone(), (16, 16, 16), classes=3)
        >>> found = net.at_scales(torch.randn(2, 16, 16, 16))
        >>> found.output.shape, found.weights.shape, found.auxiliary.shape[1]
        (torch.Size([2, 3, 16, 16]), torch.Size([2, 2, 16, 16]), 2)

    Source: Yang et al., "Dense Prediction with Attentive Feature Aggregation", WACV 2023.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        classes: int,
        scales: Sequence[float] = (0.5, 1.0),
        levels: Sequence[int] | None = None,
        fusion: Literal["rendering", "hierarchical"] = "rendering",
    ) -> None:
        super().__init__()
        require_one_of(("rendering", "hierarchical"), fusion=fusion)
        self.fusion = fusion
        self.backbone = backbone
        self.neck = AFADLAUp(channels, levels)
        self.density = AFASpatialAttention(channels[0], activation="abs" if fusion == "rendering" else "sigmoid")
        self.classifier = nn.Conv2d(channels[0], classes, 1)
        self.auxiliary = nn.ModuleList(nn.Conv2d(c, classes, 1) for c in self.neck.out_channels)
        self.scales = tuple(sorted(scales))
        require_all_positive(scales=self.scales)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Class probabilities of every pixel; they sum to less than 1, see `scale_space_rendering`."""
        return self._rendered(self._found(x, self.scales), x.shape[2:])[0].output

    def at_scales(
        self, x: Float[Tensor, "batch in_channels height width"], scales: Sequence[float] | None = None
    ) -> Segmented:
        """As calling, at these scales of the image, with all that training and people want to see."""
        size = x.shape[2:]
        found = self._found(x, self.scales if scales is None else tuple(sorted(scales)))
        rendered, own = self._rendered(found, size)
        w = rendered.weights.unsqueeze(2)
        heads = []
        for i, head in enumerate(self.auxiliary):
            p = torch.stack([_resized(head(scale.nodes[i]), size).softmax(1) for scale in found], 1)
            heads.append((w * p).sum(1))
        return Segmented(rendered.output, torch.stack(own, 1), torch.stack(heads, 1), rendered.weights)

    def loss(
        self,
        found: Segmented,
        labels: Int[Tensor, "batch height width"],
        by_scale: float = 0.05,
        auxiliary: float = 0.05,
        ignore: int = 255,
        rmi: bool = False,
    ) -> Float[Tensor, ""]:
        """The paper's loss: cross-entropy of the fused prediction, of each scale's own, and of the auxiliary heads.

        Args:
            found: as `at_scales` gives it.
            labels: of every pixel.
            by_scale, auxiliary: weights of the two other terms, for each scale and each head.
            ignore: a label that does not count.
            rmi: whether that of the fused prediction is `rmi_loss` instead.
        """
        total = rmi_loss(found.output, labels, ignore=ignore) if rmi else log_loss(found.output, labels, ignore)
        for weight, predictions in ((by_scale, found.by_scale), (auxiliary, found.auxiliary)):
            total = total + sum(weight * log_loss(p, labels, ignore) for p in predictions.unbind(1))
        return total

    def _found(self, x: Tensor, scales: tuple[float, ...]) -> list[_Scale]:
        found = []
        for s in scales:
            image = x if s == 1 else _resized(x, [round(n * s) for n in x.shape[2:]])
            nodes = self.neck.by_node(self.backbone(image))
            found.append(_Scale(s, self.neck.fused(nodes), nodes))
        return found

    def _rendered(self, found: list[_Scale], size: Sequence[int]) -> tuple[Rendered, list[Tensor]]:
        """The scales fused, and the probabilities of each."""
        own = [_resized(self.classifier(scale.features), size).softmax(1) for scale in found]
        if self.fusion == "hierarchical":
            return hierarchical_fusion(own, [_resized(self.density(scale.features), size) for scale in found]), own
        grid = min(found, key=lambda scale: abs(scale.factor - 1)).features.shape[2:]
        densities = [self.density(_resized(scale.features, grid)) for scale in found]
        return scale_space_rendering(own, densities), own


def log_loss(
    probabilities: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    ignore: int = 255,
) -> Float[Tensor, ""]:
    """Cross-entropy of probabilities that need not sum to 1 and can be 0: they are clipped at 1e-8.

    >>> log_loss(torch.full((1, 2, 1, 1), 0.5), torch.zeros(1, 1, 1, dtype=torch.long)).exp().round().item()
    2.0
    """
    return F.nll_loss(probabilities.clamp(min=LEAST).log(), labels.long(), ignore_index=ignore)


def bilinear_up(channels: int, factor: int) -> nn.ConvTranspose2d:
    """A learned enlargement, each channel on its own, that begins as bilinear interpolation.

    >>> up = bilinear_up(1, 2)
    >>> up(torch.ones(1, 1, 3, 3))[0, 0, 2].tolist()
    [0.75, 1.0, 1.0, 1.0, 1.0, 0.75]
    """
    # an odd factor needs a kernel with a middle, or the map would be one cell too large
    kernel = 2 * factor - factor % 2
    up = nn.ConvTranspose2d(channels, channels, kernel, factor, factor // 2, groups=channels, bias=False)
    at = torch.arange(kernel) / factor - (kernel - 1) / (2 * factor)
    line = 1 - at.abs()
    with torch.no_grad():
        up.weight.copy_(torch.outer(line, line))
    return up


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return (
        x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)
    )
