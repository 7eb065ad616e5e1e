from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive, require_one_of
from cenote.pool.spatial.deeplab.dense_crf import DenseCRF, unary_from_probabilities
from cenote.pool.spatial.output_stride import upsampled
from cenote.pool.spatial.segmentation import evaluated, head_rates

LARGE = (6, 12, 18, 24)
SMALL = (2, 4, 8, 12)
LARGE_FIELD_OF_VIEW = (12,)


class DeepLabASPP(nn.Module):
    """Atrous spatial pyramid pooling, the sum: the same map read at several distances.

    `y = sum_r B_r(x)`, where `B_r` begins with a 3 x 3 convolution whose taps lie `r` cells apart. Either that is all, straight
    to the classes (on ResNet-101), or two 1 x 1 layers of `hidden` channels follow (on VGG-16).

    Args:
        in_channels: of the map.
        classes: channels of the result.
        rates: one per branch: `LARGE` (6, 12, 18, 24) is ASPP-L, `SMALL` (2, 4, 8, 12) is ASPP-S, (12,) is LargeFOV.
        hidden: `None`, or the width of the two hidden layers, 1024 on VGG-16.
        dropout: after each hidden layer.

    Example:
        >>> DeepLabASPP(32, classes=21)(torch.randn(2, 32, 9, 9)).shape
        torch.Size([2, 21, 9, 9])

    Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
        Connected CRFs", TPAMI 2018.

    Note:
        The last layers start at deviation 0.01 and bias 0; no binding rule was available.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        rates: Sequence[int] = LARGE,
        hidden: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        require_all_positive(rates=rates)
        self.rates = tuple(rates)
        self.branches = nn.ModuleList(_branch(in_channels, classes, r, hidden, dropout) for r in rates)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Scores at the size of the map."""
        return self.by_rate(x).sum(1)

    def by_rate(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch rates classes height width"]:
        """What each branch adds to the scores: which distance spoke for a class."""
        return torch.stack([branch(x) for branch in self.branches], 1)

    def classifiers(self) -> list[nn.Module]:
        """The layers that give class scores, one per branch: what the paper trains at ten times the rate of the rest."""
        return [b[-1] if isinstance(b, nn.Sequential) else b for b in self.branches]


class MultiScale(nn.Module):
    """Runs a net on its input at several scales and fuses what comes out, position by position.

    Args:
        net: maps to maps.
        scales: of the input; the results are enlarged to the largest of them.
        fuse: `"max"` of the scores, as in DeepLab, or `"mean"`.

    Example:
        >>> MultiScale(torch.nn.Conv2d(3, 5, 3, padding=1), (0.5, 1.0))(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 5, 8, 8])

    Source: Chen et al., "DeepLab", TPAMI 2018.
    """

    def __init__(
        self, net: nn.Module, scales: Sequence[float] = (0.5, 0.75, 1.0), fuse: Literal["max", "mean"] = "max"
    ) -> None:
        super().__init__()
        require_all_positive(scales=scales)
        require_one_of(("max", "mean"), fuse=fuse)
        self.net = net
        self.scales = tuple(scales)
        self.fuse = fuse

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out h w"]:
        """The fused map."""
        return self.fused(self.by_scale(x))

    def fused(self, maps: Float[Tensor, "batch scales out h w"]) -> Float[Tensor, "batch out h w"]:
        """One map of those of all scales."""
        return maps.amax(1) if self.fuse == "max" else maps.mean(1)

    def by_scale(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch scales out h w"]:
        """The map of each scale at one size; training adds a loss on each."""
        maps = [self.net(x if s == 1 else F.interpolate(x, scale_factor=s, mode="bilinear")) for s in self.scales]
        size = max((m.shape[2:] for m in maps), key=lambda s: s[0] * s[1])
        return torch.stack([m if m.shape[2:] == size else F.interpolate(m, size, mode="bilinear") for m in maps], 1)


class DeepLab(nn.Module):
    """Dense features, atrous spatial pyramid pooling, and a fully connected CRF on the enlarged scores.

    Args:
        backbone: images to maps `[batch, channels, h, w]` at `output_stride`; `to_output_stride` makes one of a classifier.
        channels: of the backbone's map.
        classes: number of classes.
        rates, hidden, dropout: see `DeepLabASPP`.
        output_stride: pixels per cell of the map.
        scales: of the input, fused by their maximum; (0.5, 0.75, 1.0) in the paper.
        crf: what refines the probabilities in `segment`; default `DenseCRF()`.

    Example:
        >>> net = DeepLab(torch.nn.Conv2d(3, 16, 3, 8, 1), 16, classes=4).eval()
        >>> images = torch.randint(256, (2, 3, 33, 41))
        >>> net(images / 255).shape, net.segment(images / 255, images).shape
        (torch.Size([2, 4, 5, 6]), torch.Size([2, 4, 33, 41]))

    Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
        Connected CRFs", TPAMI 2018.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        classes: int,
        rates: Sequence[int] = LARGE,
        hidden: int | None = None,
        output_stride: int = 8,
        scales: Sequence[float] = (1.0,),
        crf: DenseCRF | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        aspp = DeepLabASPP(channels, classes, rates, hidden, dropout)
        self.scores = MultiScale(nn.Sequential(backbone, aspp), scales)
        self.output_stride = output_stride
        self.crf = DenseCRF() if crf is None else crf

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes h w"]:
        """Scores at the size of the map, on which the paper trains; see `loss`."""
        return self.scores(x)

    def loss(
        self,
        x: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, "batch height width"],
        ignore: int = 255,
    ) -> Float[Tensor, ""]:
        """`score_map_loss` of the fused scores; with several scales those of each scale are added."""
        by_scale = self.scores.by_scale(x)
        maps = [self.scores.fused(by_scale), *(by_scale.unbind(1) if by_scale.shape[1] > 1 else ())]
        return torch.stack([score_map_loss(m, labels, self.output_stride, ignore) for m in maps]).sum()

    def parameter_groups(self, lr: float = 1e-3, times: float = 10.0) -> list[dict[str, Any]]:
        """What an optimiser is given: the layers that give class scores at `times` the rate of all else.

        The paper trains with `SGD(net.parameter_groups(), momentum=0.9, weight_decay=5e-4)` and `poly_schedule`, 20,000 steps.
        """
        aspp: Any = self.scores.net[1]  # type: ignore[index]
        return head_rates(self, aspp.classifiers(), lr, times)

    @torch.no_grad()
    def segment(
        self,
        x: Float[Tensor, "batch channels height width"],
        image: Shaped[Tensor, "batch 3 height width"] | None = None,
    ) -> Float[Tensor, "batch classes height width"]:
        """Class probabilities of every pixel; in eval mode, whatever the mode of the net.

        Args:
            x: as the backbone takes it.
            image: the same in colours from 0 to 255, for the CRF; without it the CRF is left out.
        """
        with evaluated(self):
            scores = self(x)
        p = upsampled(scores, self.output_stride, (x.shape[2], x.shape[3])).softmax(1)
        return p if image is None else self.crf(unary_from_probabilities(p), image)


def score_map_loss(
    scores: Float[Tensor, "batch classes h w"],
    labels: Int[Tensor, "batch height width"],
    output_stride: int,
    ignore: int = 255,
) -> Float[Tensor, ""]:
    """DeepLab's loss: cross-entropy on the small map, against every `output_stride`-th label.

    Args:
        scores: `[batch, classes, h, w]`, of the net, before they are enlarged.
        labels: `[batch, height, width]`, of the image.
        output_stride: pixels of the image for one of the map, in each direction.
        ignore: the label that counts nothing.

    Raises:
        InputError: where the labels, so taken, are not at the size of the map.

    Source: Chen et al., "DeepLab", TPAMI 2018.

    >>> score_map_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 9, 16, dtype=torch.long), 8).exp().round().item()
    2.0
    """
    small = labels[:, ::output_stride, ::output_stride]
    if small.shape[1:] != scores.shape[2:]:
        raise InputError(
            f"labels: every {output_stride}-th of {tuple(labels.shape[1:])} gives {tuple(small.shape[1:])}, the scores are "
            f"{tuple(scores.shape[2:])}; give the output_stride of the net"
        )
    return F.cross_entropy(scores, small.long(), ignore_index=ignore)


def _branch(channels: int, classes: int, rate: int, hidden: int | None, dropout: float) -> nn.Module:
    first = nn.Conv2d(channels, classes if hidden is None else hidden, 3, padding=rate, dilation=rate)
    if hidden is None:
        return _small(first)
    between = [nn.ReLU(), nn.Dropout(dropout)]
    last = _small(nn.Conv2d(hidden, classes, 1))
    return nn.Sequential(first, *between, nn.Conv2d(hidden, hidden, 1), nn.ReLU(), nn.Dropout(dropout), last)


def _small(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
