"""MetaFormers: four stages of blocks on feature maps that shrink, with a mixer for each stage.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of
from cenote.mix.basic.attention import AttentionMixer
from cenote.mix.basic.grids import DepthwiseConv, FrozenRandomMixer, IdentityMixer, SpatialLinear
from cenote.mix.image_training import Recipe
from cenote.mix.maps import drop_rates, norm_of, start_narrow
from cenote.mix.metaformer.block import Activation, MetaFormerBlock
from cenote.mix.metaformer.pooling import PoolMixer

Grid = tuple[int, int]
MixerMaker = Callable[[int, Grid | None], nn.Module]
"""Builds a mixer from the width and, where it is known, the grid of a stage."""


def _needing_grid(kind: Callable[[Grid], nn.Module], word: str) -> MixerMaker:
    def make(dim: int, grid: Grid | None) -> nn.Module:  # noqa: ARG001
        if grid is None:
            raise InputError(f"image: a stage of {word!r} has a number for each pair of cells; give the size of images")
        return kind(grid)

    return make


METAFORMER_RECIPE = Recipe(epochs=300, learning_rate=1e-3, per=1024, weight_decay=0.05, warm_up=5)
"""Recalled, not read again; with 4,096 images a step, stochastic depth from .1 (S12) to .4 (M48), and cutout as erasing."""

MIXERS: Mapping[str, MixerMaker] = {
    "pool": lambda _dim, _grid: PoolMixer(),
    "attention": lambda dim, _grid: AttentionMixer(dim),
    "fc": _needing_grid(SpatialLinear, "fc"),
    "random": _needing_grid(FrozenRandomMixer, "random"),
    "depthwise": lambda dim, _grid: DepthwiseConv(dim),
    "identity": lambda _dim, _grid: IdentityMixer(),
}
LETTERS = {"P": "pool", "A": "attention", "F": "fc", "R": "random", "D": "depthwise", "I": "identity"}


class Size(NamedTuple):
    """Layers and widths of the stages, and where the factors of branches start."""

    layers: tuple[int, ...]
    dims: tuple[int, ...]
    layer_scale: float


SIZES: Mapping[str, Size] = {
    "S12": Size((2, 2, 6, 2), (64, 128, 320, 512), 1e-5),
    "S24": Size((4, 4, 12, 4), (64, 128, 320, 512), 1e-5),
    "S36": Size((6, 6, 18, 6), (64, 128, 320, 512), 1e-6),
    "M36": Size((6, 6, 18, 6), (96, 192, 384, 768), 1e-6),
    "M48": Size((8, 8, 24, 8), (96, 192, 384, 768), 1e-6),
}


class PatchEmbed(nn.Module):
    """A strided convolution."""

    def __init__(self, dim: int, out_dim: int, size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding
        self.proj = nn.Conv2d(dim, out_dim, size, stride, padding)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch out rows columns"]:
        return self.proj(x)

    def grid_of(self, grid: Grid) -> Grid:
        rows, columns = ((n + 2 * self.padding - self.size) // self.stride + 1 for n in grid)
        return rows, columns


class PositionMap(nn.Module):
    """A learned map is added: a number for each channel and cell, from 0."""

    def __init__(self, dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *grid))

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        if tuple(x.shape[2:]) != self.grid:
            made, came = (f"{rows} x {columns}" for rows, columns in (self.grid, x.shape[2:]))
            raise InputError(
                f"images: the map of positions is made for a grid of {made}, got {came}; build one for that size"
            )
        return x + self.pos_embed


class MetaFormer(nn.Module):
    """Images to logits through stages of `MetaFormerBlock`; between stages a strided convolution halves the map.

    Args:
        layers: blocks of each stage.
        dims: widths of the stages.
        mixers: one word for all stages or one for each (`"pool"`, `"attention"`, `"fc"`, `"random"`, `"depthwise"`,
            `"identity"`), letters such as `"PPAA"`, or functions of the width and the grid.
        classes: number of logits; 0 gives the mean of the last map.
        image: height and width of images, needed by `"fc"`, `"random"` and maps of positions; None for any size.
        positions: whether a learned map is added before the first stage of `"attention"`, `"fc"`. Default: where `image` is
            given and there is such a stage.
        ratio, norm, act, drop, layer_scale, skip, mlp: as of `MetaFormerBlock`; `ratio` may differ by stage.
        drop_path: of the last block; rates grow evenly.
        halve: for each stage but the first, whether a convolution of stride 2 stands before it; one stands always where the
            width changes.
        channels: of images.
        patch: size, stride and padding of the first convolution.
        step: the same of those between stages.

    Raises:
        InputError: where numbers of stages differ, for an unknown word, or where a mixer needs `image`.

    Example:
        >>> net = MetaFormer((1, 1), (8, 16), "PA", classes=3)
        >>> net(torch.zeros(2, 3, 32, 48)).shape, [f.shape[1:] for f in net.features(torch.zeros(2, 3, 32, 48))]
        (torch.Size([2, 3]), [torch.Size([8, 8, 12]), torch.Size([16, 4, 6])])

    Source:
        Yu et al. 2022, arXiv 2111.11418. Parameters carry the names of the authors' code.

    Note:
        Where the map of positions stands is inferred.
    """

    def __init__(
        self,
        layers: Sequence[int],
        dims: Sequence[int],
        mixers: str | MixerMaker | Sequence[str | MixerMaker] = "pool",
        *,
        classes: int = 1000,
        image: Grid | None = None,
        positions: bool | None = None,
        ratio: float | Sequence[float] = 4.0,
        norm: str = "group",
        act: Activation = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = 1e-5,
        skip: bool = True,
        mlp: bool = True,
        halve: Sequence[bool] | None = None,
        channels: int = 3,
        patch: tuple[int, int, int] = (7, 4, 2),
        step: tuple[int, int, int] = (3, 2, 1),
    ) -> None:
        super().__init__()
        stages = len(layers)
        makers, words = _makers(mixers, stages)
        ratios = [float(ratio)] * stages if isinstance(ratio, int | float) else list(ratio)
        halve = [True] * (stages - 1) if halve is None else list(halve)
        for name, given, wanted in (("dims", dims, stages), ("ratio", ratios, stages), ("halve", halve, stages - 1)):
            if len(given) != wanted:
                raise InputError(f"{name}: expected {wanted} for {stages} stages of layers, got {len(given)}")
        self.patch_embed = PatchEmbed(channels, dims[0], *patch)
        grid = None if image is None else self.patch_embed.grid_of(image)
        first = next((i for i, word in enumerate(words) if word in ("attention", "fc")), None)
        if positions is None:
            positions = first is not None and image is not None
        if positions and first is None:
            raise InputError("positions: stand before the first stage of 'attention' or 'fc', and there is none")
        rates = drop_rates(drop_path, sum(layers))
        network: list[nn.Module] = []
        self.stages: list[int] = []
        for i, depth in enumerate(layers):
            if i and (halve[i - 1] or dims[i - 1] != dims[i]):
                down = PatchEmbed(dims[i - 1], dims[i], *step)
                grid = None if grid is None else down.grid_of(grid)
                network.append(down)
            blocks: list[nn.Module] = []
            if positions and i == first:
                if grid is None:
                    raise InputError("image: a map of positions has a number for each cell; give the size of images")
                blocks.append(PositionMap(dims[i], grid))
            blocks += [
                MetaFormerBlock(
                    dims[i],
                    makers[i](dims[i], grid),
                    ratio=ratios[i],
                    norm=norm,
                    act=act,
                    drop=drop,
                    drop_path=rates[sum(layers[:i]) + j],
                    layer_scale=layer_scale,
                    skip=skip,
                    mlp=mlp,
                )
                for j in range(depth)
            ]
            self.stages.append(len(network))
            network.append(nn.Sequential(*blocks))
        self.network = nn.ModuleList(network)
        self.dims = tuple(dims)
        self.norm = norm_of(norm, dims[-1])
        self.head = nn.Linear(dims[-1], classes) if classes else nn.Identity()
        start_narrow(self)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of the images."""
        return self.head(self.norm(self.features(images)[-1]).mean((2, 3)))

    def features(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The feature map behind each stage, `[batch, dim, rows, columns]`, not normalised."""
        x, found = self.patch_embed(images), []
        for i, part in enumerate(self.network):
            x = part(x)
            if i in self.stages:
                found.append(x)
        return found


class PoolFormer(MetaFormer):
    """The MetaFormer whose mixer is average pooling, by its published sizes.

    Args:
        size: `"S12"`, `"S24"`, `"S36"`, `"M36"` or `"M48"`.
        classes: number of logits.
        mixers: another mixer in the same network, as of `MetaFormer`; `"PPAA"` on S12 is the published hybrid.
        settings: of `MetaFormer`.

    Source:
        Yu et al. 2022, arXiv 2111.11418, table 1.
    """

    def __init__(
        self,
        size: str = "S12",
        classes: int = 1000,
        mixers: str | MixerMaker | Sequence[str | MixerMaker] = "pool",
        **settings: object,
    ) -> None:
        require_one_of(SIZES, size=size)
        layers, dims, layer_scale = SIZES[size]
        super().__init__(layers, dims, mixers, classes=classes, **{"layer_scale": layer_scale, **settings})  # type: ignore[arg-type]


class FeatureMaps(nn.Module):
    """A MetaFormer as the backbone of dense heads: the map behind each stage, each under a norm of its own.

    Args:
        net: the backbone; its last norm and its head are not used.
        norm: as of `MetaFormerBlock`.
    """

    def __init__(self, net: MetaFormer, norm: str = "group") -> None:
        super().__init__()
        self.net = net
        self.norms = nn.ModuleList([norm_of(norm, dim) for dim in net.dims])

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """`[batch, dim, rows, columns]` of each stage, for images of any size that the mixers take."""
        return [norm(x) for norm, x in zip(self.norms, self.net.features(images), strict=True)]


def load_transformers(net: MetaFormer, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a `PoolFormerForImageClassification` of transformers, in place.

    Args:
        net: of the same size.
        weights: its `state_dict()`.

    Raises:
        InputError: where the sizes differ.
    """
    found = {}
    for name, value in weights.items():
        words = name.removeprefix("poolformer.").split(".")
        if words[1] == "patch_embeddings":
            i = int(words[2])
            ours = "patch_embed.proj" if not i else f"network.{net.stages[i] - 1}.proj"
            found[f"{ours}.{words[-1]}"] = value
        elif words[1] == "block":
            rest = ".".join(words[4:])
            for theirs, own in _OURS:
                rest = rest.replace(theirs, own)
            found[f"network.{net.stages[int(words[2])]}.{words[3]}.{rest}"] = value
        else:
            found[f"{'head' if words[0] == 'classifier' else 'norm'}.{words[-1]}"] = value
    try:
        net.load_state_dict(found)
    except RuntimeError as error:
        raise InputError(f"weights: are not those of a network of this size: {error}") from None


_OURS = (
    ("before_norm", "norm1"),
    ("after_norm", "norm2"),
    ("output.conv1", "mlp.fc1"),
    ("output.conv2", "mlp.fc2"),
)


def _makers(
    mixers: str | MixerMaker | Sequence[str | MixerMaker], stages: int
) -> tuple[list[MixerMaker], list[str | None]]:
    if isinstance(mixers, str):
        letters = mixers.isupper()
        given: list[str | MixerMaker] = [*mixers] if letters else [mixers] * stages
    else:
        given = [mixers] * stages if callable(mixers) else list(mixers)
    given = [LETTERS.get(m, m) if isinstance(m, str) else m for m in given]
    if len(given) != stages:
        raise InputError(f"mixers: expected one for each of {stages} stages, got {len(given)}")
    for word in given:
        if isinstance(word, str):
            require_one_of((*MIXERS, *LETTERS), mixers=word)
    makers = [MIXERS[m] if isinstance(m, str) else m for m in given]
    return makers, [m if isinstance(m, str) else None for m in given]
