from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive, require_positive
from cenote.core.sets import as_tokens

Build = Callable[[], nn.Module]

POOL: Build = functools.partial(nn.MaxPool2d, 3, 2, ceil_mode=True)


class Evidence(NamedTuple):
    """Class scores and where they come from.

    Attributes:
        logits: `[batch, classes]`.
        maps: `[batch, classes, height, width]`, whose mean over the (real) positions is the logit.
    """

    logits: Float[Tensor, "batch classes"]
    maps: Float[Tensor, "batch classes height width"]


class Located(NamedTuple):
    """Where in the image the evidence for a class lies.

    Attributes:
        maps: `[batch, classes, height, width]`, the class maps enlarged to the image.
        classes: `[batch]`, the class that was asked for, or the named one.
        position: `[batch, 2]`, row and column of the largest evidence.
        box: `[batch, 4]`, top, left, bottom and right of the pixels with much of it, the last two excluded.
    """

    maps: Float[Tensor, "batch classes height width"]
    classes: Int[Tensor, "batch"]
    position: Int[Tensor, "batch 2"]
    box: Int[Tensor, "batch 4"]


class MLPConv(nn.Module):
    """A small perceptron that slides over the map: a convolution and 1 x 1 convolutions, each with a ReLU.

    `f1 = max(w1 * x + b1, 0)`, `f2 = max(w2 f1 + b2, 0)`, and so on.

    Args:
        in_channels: channels of the input.
        widths: channels after each layer; the first is the convolution.
        kernel_size, stride, padding: of the convolution.
        final_relu: whether the last layer has its ReLU.

    Example:
        >>> MLPConv(3, (16, 16, 8), kernel_size=5, padding=2)(torch.randn(2, 3, 9, 9)).shape
        torch.Size([2, 8, 9, 9])

    Source: Lin, Chen, Yan, "Network In Network", ICLR 2014.

    Note:
        Weights start from He's distribution, biases from 0; the sheet of the paper gives no binding rule.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        final_relu: bool = True,
    ) -> None:
        super().__init__()
        require_all_positive(widths=widths)
        layers: list[nn.Module] = []
        before = in_channels
        for i, width in enumerate(widths):
            conv = nn.Conv2d(before, width, kernel_size, stride, padding) if i == 0 else nn.Conv2d(before, width, 1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*(layers if final_relu else layers[:-1]))

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch channels out_h out_w"]:
        """The map after all layers."""
        return self.layers(x)


class GlobalAveragePool(nn.Module):
    """One map per class; its mean is the logit.

    `s_k = (1/HW) sum_ij F_k(i, j)`

    Example:
        >>> GlobalAveragePool()(torch.ones(2, 10, 8, 8)).shape
        torch.Size([2, 10])

    Source: Lin, Chen, Yan, "Network In Network", ICLR 2014. The mask is ours.
    """

    def forward(
        self,
        maps: Float[Tensor, "batch classes height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Logits; with a mask, True on real positions, of those alone (zeros where there is none)."""
        if not isinstance(maps, Tensor) or maps.dim() != 4:
            came = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise InputError(f"maps: expected [batch, classes, height, width], got {came}")
        return as_tokens(maps, mask).mean()


def class_maps(
    features: Float[Tensor, "batch channels height width"], classifier: nn.Linear
) -> Float[Tensor, "batch classes height width"]:
    """Class activation maps of a linear classifier on the mean of `features`: `M_k = sum_c w_kc A_c + b_k`.

    The mean of map `k` is the logit of class `k`. Network In Network is the case where the map is the class channel itself.

    Args:
        features: the last maps before the mean.
        classifier: what maps their mean to logits.

    Source: Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, after Network In Network.

    >>> features, classifier = torch.randn(2, 8, 4, 4), torch.nn.Linear(8, 3)
    >>> torch.allclose(class_maps(features, classifier).mean((2, 3)), classifier(features.mean((2, 3))), atol=1e-5)
    True
    """
    if features.dim() != 4 or features.shape[1] != classifier.in_features:
        raise InputError(
            f"features: expected [batch, {classifier.in_features}, height, width] for this classifier, "
            f"got {tuple(features.shape)}"
        )
    return classifier(features.movedim(1, -1)).movedim(-1, 1)


class NetworkInNetwork(nn.Module):
    """Three mlpconv blocks with pooling and dropout between them, and global average pooling instead of a classifier.

    Args:
        in_channels: of the image.
        classes: number of classes, the last block's last width.
        blocks: widths of each block, of the last one without its class layer. Default: the net for CIFAR-10.
        kernels: kernel size of each block's convolution, padded to keep the size.
        pools: what builds the pooling after each block but the last; default maximum over 3 x 3, stride 2.
        dropout: after each block but the last.
        final_relu: whether the class maps pass a ReLU, as in the authors' configuration; then no logit is negative.

    Example:
        >>> net = NetworkInNetwork().eval()
        >>> sum(p.numel() for p in net.parameters())
        966986
        >>> logits, maps = net.evidence(torch.randn(1, 3, 32, 32))
        >>> logits.shape, maps.shape
        (torch.Size([1, 10]), torch.Size([1, 10, 8, 8]))

    Source: Lin, Chen, Yan, "Network In Network", ICLR 2014.

    Note:
        No ReLU before the mean by default: with one, a class whose map is dead has no gradient. The public configuration for
        CIFAR-10 has an average in its second pooling, the paper's text a maximum in both; the text is the default.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        blocks: Sequence[Sequence[int]] = ((192, 160, 96), (192, 192, 192), (192, 192)),
        kernels: Sequence[int] = (5, 5, 3),
        pools: Sequence[Build] | None = None,
        dropout: float = 0.5,
        final_relu: bool = False,
    ) -> None:
        super().__init__()
        between = [POOL] * (len(blocks) - 1) if pools is None else list(pools)
        if not blocks or len(kernels) != len(blocks) or len(between) != len(blocks) - 1:
            raise InputError(
                f"blocks: expected one kernel per block and one pool between any two, "
                f"got {len(blocks)} blocks, {len(kernels)} kernels, {len(between)} pools"
            )
        layers: list[nn.Module] = []
        before = in_channels
        for i, (widths, kernel) in enumerate(zip(blocks, kernels, strict=True)):
            last = i == len(blocks) - 1
            widths = (*widths, classes) if last else tuple(widths)
            layers.append(MLPConv(before, widths, kernel, padding=kernel // 2, final_relu=final_relu or not last))
            if not last:
                layers += [between[i](), nn.Dropout(dropout)]
            before = widths[-1]
        self.trunk = nn.Sequential(*layers)
        self.pool = GlobalAveragePool()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of images."""
        return self.evidence(x).logits

    def evidence(self, x: Float[Tensor, "batch channels height width"]) -> Evidence:
        """Logits, and the class maps whose means they are."""
        maps = self.trunk(x)
        return Evidence(self.pool(maps), maps)

    @torch.no_grad()
    def locate(
        self, x: Float[Tensor, "batch channels height width"], target: int | None = None, share: float = 0.5
    ) -> Located:
        """Where the evidence lies, in pixels of images of any size.

        Args:
            x: images.
            target: the class whose evidence is asked for; default: the one that the net names.
            share: a pixel belongs to the box whose evidence is so far up from the smallest to the largest of its map.

        Raises:
            InputError: where there is no such class, or the share is none.
        """
        if not 0 < share <= 1:
            raise InputError(f"share: expected a number above 0 and up to 1, got {share}")
        logits, maps = self.evidence(x)
        if target is not None and not 0 <= target < logits.shape[1]:
            raise InputError(f"target: expected one of {logits.shape[1]} classes, from 0, got {target}")
        classes = logits.argmax(1) if target is None else torch.full_like(logits[:, 0], target, dtype=torch.int64)
        large = F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)
        chosen = large[torch.arange(len(x)), classes]
        at = chosen.flatten(1).argmax(1)
        least, most = chosen.amin((1, 2), keepdim=True), chosen.amax((1, 2), keepdim=True)
        inside = chosen >= least + share * (most - least)
        sides = [_ends(inside.any(axis)) for axis in (2, 1)]
        box = torch.stack([side[i] for i in (0, 1) for side in sides], 1)
        return Located(large, classes, torch.stack([at // x.shape[3], at % x.shape[3]], 1), box)


class Whitening(nn.Module):
    """Images of equal contrast whose pixels are uncorrelated: what the nets were trained on.

    Global contrast normalisation, each image by itself: `x <- (x - mean x) / sqrt(var x + eps)`. Then ZCA:
    `x <- (x - m) U diag((s + eps)^-1/2) U^T`, with the mean `m` and the covariance `U diag(s) U^T` of the training images.

    Before `fit` the second step changes nothing. What was fitted is saved with the net: `Sequential(whitening, net)`.

    Args:
        size: `(channels, height, width)` of an image.
        contrast_eps, zca_eps: added to the variance of an image, and to the variances `s`.

    Raises:
        InputError: where images are of another size, or too few to fit.

    Example:
        >>> whitening = Whitening((1, 2, 2)).fit(torch.randn(50, 1, 2, 2))
        >>> whitening(torch.randn(3, 1, 2, 2)).shape
        torch.Size([3, 1, 2, 2])

    Source: Goodfellow et al., "Maxout Networks", ICML 2013, which Lin, Chen, Yan, ICLR 2014, follow. The constants are ours.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, size: tuple[int, int, int], contrast_eps: float = 1e-8, zca_eps: float = 0.1) -> None:
        super().__init__()
        require_all_positive(size=size)
        require_positive(contrast_eps=contrast_eps, zca_eps=zca_eps)
        self.size = tuple(size)
        self.contrast_eps = contrast_eps
        self.zca_eps = zca_eps
        pixels = math.prod(size)
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("matrix", torch.eye(pixels))

    @torch.no_grad()
    def fit(self, images: Float[Tensor, "images channels height width"]) -> Whitening:
        """Learn mean and covariance from training images, and return itself."""
        flat = self._contrasted(images).double()
        if len(flat) < 2:
            raise InputError(f"images: a covariance needs at least two, got {len(flat)}")
        self.mean.copy_(flat.mean(0))
        variances, axes = torch.linalg.eigh(flat.T.cov(correction=0))
        self.matrix.copy_((axes / (variances.clamp(min=0) + self.zca_eps).sqrt()) @ axes.T)
        return self

    def forward(
        self, x: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images channels height width"]:
        """Whitened images."""
        return ((self._contrasted(x) - self.mean) @ self.matrix).view(x.shape)

    def _contrasted(self, x: Tensor) -> Float[Tensor, "images pixels"]:
        if x.dim() != 4 or x.shape[1:] != self.size:
            raise InputError(f"images: expected [images, {', '.join(map(str, self.size))}], got {tuple(x.shape)}")
        flat = x.flatten(1)
        variance, mean = torch.var_mean(flat, 1, correction=0, keepdim=True)
        return (flat - mean) / (variance + self.contrast_eps).sqrt()


def _ends(inside: Bool[Tensor, "batch cells"]) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
    """The first cell that is inside, and the one behind the last."""
    return inside.int().argmax(1), inside.shape[1] - inside.flip(1).int().argmax(1)
