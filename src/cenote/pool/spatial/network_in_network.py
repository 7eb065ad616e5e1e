from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive
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
