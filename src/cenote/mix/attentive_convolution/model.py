"""AttNet: a network of four stages of attentive convolutions.

Source: Yu et al., "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency", 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.mix.attentive_convolution.convolution import ATConv
from cenote.mix.image_training import Recipe
from cenote.mix.maps import ChannelLayerNorm, ChannelRMSNorm, DropPath, drop_rates, on_map, start_narrow
from cenote.mix.metaformer.block import Activation

EPS = 1e-6


class Size(NamedTuple):
    """Blocks and widths of the stages, whether gated mixers have a norm, branches a factor, and the stochastic depth."""

    layers: tuple[int, ...]
    dims: tuple[int, ...]
    glu_norm: bool
    layer_scale: float | None
    drop_path: float


ATTNET_RECIPE = Recipe(
    epochs=300, learning_rate=4e-3, per=4096, weight_decay=0.05, warm_up=5, magnitude=9, erasing=0.25
)
"""Published for T2; its stochastic depth grows with the size, as `SIZES` has it."""

RATIOS = (8.0, 8.0, 4.0, 4.0)
SIZES: Mapping[str, Size] = {
    "XXS": Size((2, 2, 4, 2), (32, 64, 128, 240), False, None, 0.02),
    "XS": Size((2, 2, 7, 2), (40, 80, 160, 320), False, 1e-6, 0.02),
    "S": Size((2, 3, 10, 3), (40, 80, 160, 320), False, 1e-6, 0.1),
    "T1": Size((2, 3, 12, 3), (48, 96, 224, 384), True, 1e-6, 0.1),
    "T2": Size((3, 3, 16, 3), (64, 128, 288, 512), True, 1e-6, 0.2),
    "T3": Size((4, 4, 26, 4), (72, 144, 320, 576), True, 1e-6, 0.4),
    "T4": Size((5, 5, 28, 5), (96, 192, 384, 768), True, 1e-6, 0.5),
}


class GatedChannelMixer(nn.Module):
    """`W_2 norm(act(D a) * v)` at each cell, with `a, v` the halves of `W_1 x` and `D` a depthwise convolution.

    Args:
        dim: width of a cell.
        ratio: the hidden width is `2 (dim ratio) // 3`.
        act: builds the activation.
        dconv: whether there is a 3 x 3 depthwise convolution.
        norm: whether the product goes through an RMSNorm over channels.
        drop: dropout before the last map and behind it.
    """

    def __init__(
        self,
        dim: int,
        ratio: float = 4.0,
        *,
        act: Activation = nn.GELU,
        dconv: bool = True,
        norm: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 2 * int(dim * ratio) // 3
        self.fc1 = nn.Conv2d(dim, 2 * hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if dconv else nn.Identity()
        self.act = act()
        self.norm_layer = ChannelRMSNorm(hidden, EPS) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        a, v = self.fc1(x).chunk(2, 1)
        return self.drop(self.fc2(self.drop(self.norm_layer(self.act(self.dwconv(a)) * v))))


class LayerScale(nn.Module):
    """A factor for each channel of a feature map."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        return x * self.gamma.view(-1, 1, 1)


class AttNetBlock(nn.Module):
    """`x = x + s_1 mixer(LN(x))`, `x = x + s_2 GLU(LN(x))`; the norms are over the channels of each cell.

    Args:
        dim: width of a cell.
        mixer: what `on_map` takes; None for an `ATConv`.
        ratio, act, dconv, norm, drop: as of `GatedChannelMixer`.
        layer_scale: first value of the factors; None for none.
        drop_path: share of images that go without a branch, in training.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module | None = None,
        *,
        ratio: float = 4.0,
        act: Activation = nn.GELU,
        dconv: bool = True,
        norm: bool = True,
        drop: float = 0.0,
        layer_scale: float | None = EPS,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_1 = ChannelLayerNorm(dim, EPS)
        self.token_mixer = ATConv(dim, act=act) if mixer is None else mixer
        self.norm_2 = ChannelLayerNorm(dim, EPS)
        self.channel_mixer = GatedChannelMixer(dim, ratio, act=act, dconv=dconv, norm=norm, drop=drop)
        self.layer_scale_1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.layer_scale_2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        x = x + self.drop_path(self.layer_scale_1(on_map(self.token_mixer, self.norm_1(x))))
        return x + self.drop_path(self.layer_scale_2(self.channel_mixer(self.norm_2(x))))


class AttNet(nn.Module):
    """Images to logits: a stem that quarters the map, stages of `AttNetBlock`, and convolutions that halve it between them.

    Args:
        size: `"XXS"`, `"XS"`, `"S"`, `"T1"` to `"T4"`; None for the arguments below alone.
        classes: number of logits.
        layers, dims, ratios: of the stages; ratios of gated mixers to the width.
        mixer: builds another mixer from a width; None for `ATConv` with kernels of 3 x 3.
        glu_norm, layer_scale, drop_path: as of the blocks; the last is that of the last block, rates grow evenly.
        drop: dropout in gated mixers.
        act: builds activations.
        channels: of images.

    Raises:
        InputError: for an unknown size, or where numbers of stages differ.

    Example:
        >>> net = AttNet(None, 3, layers=(1, 1), dims=(8, 12), ratios=(4, 4))
        >>> net(torch.zeros(2, 3, 32, 40)).shape
        torch.Size([2, 3])

    Source:
        Yu et al. 2025, arXiv 2510.20092.
    """

    def __init__(
        self,
        size: str | None = "XXS",
        classes: int = 1000,
        *,
        layers: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        ratios: Sequence[float] = RATIOS,
        mixer: Callable[[int], nn.Module] | None = None,
        glu_norm: bool | None = None,
        layer_scale: float | None = EPS,
        drop_path: float | None = None,
        drop: float = 0.0,
        act: Activation = nn.GELU,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if size is not None:
            require_one_of(SIZES, size=size)
            named = SIZES[size]
            layers, dims = named.layers if layers is None else layers, named.dims if dims is None else dims
            glu_norm = named.glu_norm if glu_norm is None else glu_norm
            layer_scale = named.layer_scale
            drop_path = named.drop_path if drop_path is None else drop_path
        if layers is None or dims is None:
            raise InputError("layers, dims: give both, or a size")
        for name, given in (("dims", dims), ("ratios", ratios)):
            if len(given) != len(layers):
                raise InputError(f"{name}: expected {len(layers)} as the stages of layers, got {len(given)}")
        self.stem = nn.Sequential(*_conv_norm(channels, dims[0] // 2), nn.GELU(), *_conv_norm(dims[0] // 2, dims[0]))
        rates = drop_rates(drop_path or 0.0, sum(layers))
        stages = []
        for i, (depth, dim) in enumerate(zip(layers, dims, strict=True)):
            down = _conv_norm(dims[i - 1], dim) if i else []
            blocks = [
                AttNetBlock(
                    dim,
                    None if mixer is None else mixer(dim),
                    ratio=ratios[i],
                    act=act,
                    norm=True if glu_norm is None else glu_norm,
                    drop=drop,
                    layer_scale=layer_scale,
                    drop_path=rates[sum(layers[:i]) + j],
                )
                for j in range(depth)
            ]
            stages.append(nn.Sequential(*down, *blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], classes) if classes else nn.Identity()
        start_narrow(self)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of the images."""
        return self.head(self.norm(self.features(images)[-1].mean((2, 3))))

    def features(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The feature map behind each stage, `[batch, dim, rows, columns]`."""
        x, found = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


def _conv_norm(dim: int, out_dim: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False), nn.BatchNorm2d(out_dim)]
