from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive, require_at_least
from cenote.core.sets import as_tokens
from cenote.pool.spatial.atrous_rates import recommend_rates, valid_taps
from cenote.pool.spatial.axes import integers_per_axis
from cenote.pool.spatial.crops import Labelled, train_on_crops
from cenote.pool.spatial.output_stride import dilate, to_output_stride, upsampled
from cenote.pool.spatial.segmentation import evaluated, poly_schedule
from cenote.pool.training import History

Rate = int | tuple[int, int]
Norm = Callable[[int], nn.Module]

RATES = (6, 12, 18)
MULTI_GRID = (1, 2, 4)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Of the input, at which the paper tests, with mirror images."""


class Ranges(NamedTuple):
    """What a pyramid gives, and which range of context it came from.

    Attributes:
        output: `[batch, out_channels, height, width]`.
        energies: `[batch, ranges, height, width]`: length of each branch's vector; the 1 x 1 branch comes first, then the
            rates, then the whole image.
    """

    output: Float[Tensor, "batch out_channels height width"]
    energies: Float[Tensor, "batch ranges height width"]


class DeepLabV3ASPP(nn.Module):
    """Atrous spatial pyramid pooling, the concatenation, with the whole image as one more range.

    `b_0 = ReLU(BN(1 x 1))`, `b_r = ReLU(BN(3 x 3 at rate r))` for each rate, `g = ReLU(BN(1 x 1 (mean of the map)))`, spread
    over all positions; `y = ReLU(BN(1 x 1 [b_0, b_r, ..., g]))`.

    A 3 x 3 filter at rate `r` has all of its taps inside a map of side `S` at the share `max(0, (S - 2r) / S)^2` of the
    positions, and is a 1 x 1 filter from `r = S` on: choose rates by the size of the map, or let `rates="auto"` do it.

    Args:
        in_channels: of the map.
        out_channels: of each branch and of the result.
        rates: one per 3 x 3 branch, or `(down, across)`; (6, 12, 18) is for output stride 16, twice that for 8. `"auto"`:
            three rates by `recommend_rates` from `input_size` and `output_stride`.
        image_pool: whether there is the branch of the whole image.
        dropout: after the projection.
        input_size: with `rates="auto"`: side of the image, or `(height, width)`.
        output_stride: with `rates="auto"`: pixels per cell of the map.
        norm: normalisation of so many channels. Batch normalisation of the image branch cannot train on one image, group
            normalisation can: `lambda channels: torch.nn.GroupNorm(32, channels)`.

    Raises:
        InputError: where an argument is out of range, or the image branch is to train on one image.

    Example:
        >>> aspp = DeepLabV3ASPP(32, 16, rates=(1, 2, 3)).eval()
        >>> aspp(torch.randn(2, 32, 9, 9)).shape, aspp.attend(torch.randn(2, 32, 9, 9)).energies.shape
        (torch.Size([2, 16, 9, 9]), torch.Size([2, 5, 9, 9]))
        >>> DeepLabV3ASPP(32, rates="auto", input_size=513).rates
        ((6, 6), (12, 12), (18, 18))

    Source: Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017; the mask
        and the energies are ours.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[Rate] | Literal["auto"] = RATES,
        image_pool: bool = True,
        dropout: float = 0.0,
        input_size: int | tuple[int, int] | None = None,
        output_stride: int = 16,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if rates == "auto":
            if input_size is None:
                raise InputError("input_size: rates='auto' follow from the side of the image; give it")
            rates = recommend_rates(input_size, output_stride)
        self.rates = tuple(integers_per_axis("rates", r, 2) for r in rates)
        self.branches = nn.ModuleList([_unit(in_channels, out_channels, norm)])
        self.branches.extend(_unit(in_channels, out_channels, norm, r) for r in self.rates)
        self.image = _unit(in_channels, out_channels, norm) if image_pool else None
        ranges = len(self.branches) + (self.image is not None)
        self.project = nn.Sequential(_unit(ranges * out_channels, out_channels, norm), nn.Dropout(dropout))

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """The map after the pyramid; with a mask, True on real positions, the image's mean is over those alone."""
        return self.project(torch.cat(self._ranges(x, mask), 1))

    def attend(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Ranges:
        """As calling the pyramid, and also how strongly each range spoke at each position."""
        parts = self._ranges(x, mask)
        energies = torch.stack([p.norm(dim=1) for p in parts], 1)
        return Ranges(self.project(torch.cat(parts, 1)), energies)

    def multiply_adds(self, height: int, width: int) -> int:
        """Of one map of that size: `(C O (1 + 9 R) + B O^2) h w + C O`, with `R` rates and `B` branches to `O` channels.

        The last term is the branch of the whole image. Norms and biases are not counted.
        """
        channels, out = self.branches[0][0].in_channels, self.branches[0][0].out_channels  # type: ignore[index]
        convs = [
            m for m in self.modules() if isinstance(m, nn.Conv2d) and (self.image is None or m is not self.image[0])
        ]
        by_place = sum(m.weight.numel() for m in convs)
        return by_place * height * width + (0 if self.image is None else channels * out)

    def _ranges(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        if x.dim() != 4:
            raise InputError(f"x: expected [batch, channels, height, width], got {tuple(x.shape)}")
        parts = [branch(x) for branch in self.branches]
        if self.image is not None:
            if self.training and x.shape[0] == 1 and isinstance(self.image[1], nn.modules.batchnorm._BatchNorm):
                raise InputError(
                    "x: batch normalisation of the image branch cannot train on one image; give at least two, call eval() "
                    "first, or build with a norm such as lambda channels: torch.nn.GroupNorm(32, channels)"
                )
            mean = as_tokens(x, mask).mean()[:, :, None, None]
            parts.append(self.image(mean).expand(-1, -1, *x.shape[2:]))
        return parts


class DeepLabV3Head(nn.Module):
    """Atrous spatial pyramid pooling and a 1 x 1 convolution to the classes.

    Args:
        in_channels: of the map.
        classes: number of classes.
        channels: inside.
        rates, image_pool, dropout, input_size, output_stride, norm: see `DeepLabV3ASPP`.

    Example:
        >>> DeepLabV3Head(32, classes=21, channels=16)(torch.randn(2, 32, 9, 9)).shape
        torch.Size([2, 21, 9, 9])

    Source: as `DeepLabV3ASPP`.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        channels: int = 256,
        rates: Sequence[Rate] | Literal["auto"] = RATES,
        image_pool: bool = True,
        dropout: float = 0.0,
        input_size: int | tuple[int, int] | None = None,
        output_stride: int = 16,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.aspp = DeepLabV3ASPP(in_channels, channels, rates, image_pool, dropout, input_size, output_stride, norm)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch classes height width"]:
        """Logits at the size of the map."""
        return self.classifier(self.aspp(x, mask))


class DeepLabV3(nn.Module):
    """A dense backbone, the pyramid, a classifier, and bilinear enlargement to the size of the image.

    Args:
        backbone: images to maps `[batch, channels, h, w]` at `output_stride`: see `to_output_stride`, `multi_grid`,
            `AtrousCascade`.
        channels: of the backbone's map.
        classes: number of classes.
        output_stride: pixels per cell of the map.
        rates: of the pyramid; default (6, 12, 18) at output stride 16, twice that at 8.
        width: channels inside of the head.
        image_pool: whether the head has the branch of the whole image.
        dropout, input_size, norm: of the head, see `DeepLabV3ASPP`; `rates="auto"` needs `input_size`.

    Example:
        >>> net = DeepLabV3(torch.nn.Conv2d(3, 16, 3, 16, 1), 16, classes=4, width=8).eval()
        >>> net(torch.randn(2, 3, 33, 40)).shape, net.segment(torch.randn(2, 3, 33, 40)).shape
        (torch.Size([2, 4, 33, 40]), torch.Size([2, 4, 33, 40]))

    Source: as `DeepLabV3ASPP`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        classes: int,
        output_stride: int = 16,
        rates: Sequence[Rate] | Literal["auto"] | None = None,
        width: int = 256,
        image_pool: bool = True,
        dropout: float = 0.0,
        input_size: int | tuple[int, int] | None = None,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if rates is None:
            rates = tuple(max(1, round(r * 16 / output_stride)) for r in RATES)
        self.backbone = backbone
        self.head = DeepLabV3Head(channels, classes, width, rates, image_pool, dropout, input_size, output_stride, norm)
        self.output_stride = output_stride

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Logits of every pixel; the paper trains on these, see `pixel_loss`."""
        return upsampled(self.head(self.backbone(x)), self.output_stride, (x.shape[2], x.shape[3]))

    def at_output_stride(
        self, output_stride: int, example: Float[Tensor, "batch in_channels height width"]
    ) -> DeepLabV3:
        """A copy whose map is as much denser, with the same weights: the rates grow as the stride falls, 16 to 8 twice.

        Args:
            output_stride: below the present one, see `to_output_stride`; the paper trains at 16 and tests at 8.
            example: an input of the backbone.

        Raises:
            InputError: where the net cannot have that stride.
        """
        times, rest = divmod(self.output_stride, output_stride)
        if rest or times < 1:
            raise InputError(f"output_stride: expected a part of the present {self.output_stride}, got {output_stride}")
        net = copy.deepcopy(self)
        net.backbone = to_output_stride(self.backbone, output_stride, example).train(self.backbone.training)
        net.output_stride = output_stride
        aspp = net.head.aspp
        aspp.rates = tuple((down * times, across * times) for down, across in aspp.rates)
        for branch in aspp.branches[1:]:
            dilate(branch[0], times)  # type: ignore[index]
        return net

    @torch.no_grad()
    def segment(
        self, x: Float[Tensor, "batch in_channels height width"], scales: Sequence[float] = (1.0,), flip: bool = False
    ) -> Float[Tensor, "batch classes height width"]:
        """Class probabilities, the mean over scales of the input (`SCALES` in the paper) and over mirror images.

        In eval mode, whatever the mode of the net.
        """
        require_all_positive(scales=scales)
        size, parts = x.shape[2:], []
        with evaluated(self):
            for s in scales:
                scaled = x if s == 1 else F.interpolate(x, scale_factor=s, mode="bilinear")
                logits = [self(scaled)] + ([self(scaled.flip(-1)).flip(-1)] if flip else [])
                parts += [F.interpolate(one, size, mode="bilinear").softmax(1) for one in logits]
        return torch.stack(parts).mean(0)


class AtrousCascade(nn.Sequential):
    """More blocks after the last one, each at twice the rate of the one before: the way to long context without a pyramid.

    Block `b` has one unit per entry `m` of the multi-grid, at rate `base_rate 2^b m`.

    Args:
        unit: a residual unit of the given rate that keeps channels and size.
        blocks: how many; 3 in the paper (blocks 5 to 7).
        base_rate: of the first of them; 4 after a block 4 at output stride 16.
        multi_grid: rates of the units of a block.

    Example:
        >>> unit = lambda rate: torch.nn.Conv2d(4, 4, 3, padding=rate, dilation=rate)
        >>> [conv.dilation[0] for block in AtrousCascade(unit, 2) for conv in block]
        [4, 8, 4, 8, 16, 8]

    Source: as `DeepLabV3ASPP`.
    """

    def __init__(
        self,
        unit: Callable[[int], nn.Module],
        blocks: int = 3,
        base_rate: int = 4,
        multi_grid: Sequence[int] = (1, 2, 1),
    ) -> None:
        if blocks < 1 or base_rate < 1 or not multi_grid or min(multi_grid) < 1:
            raise InputError(
                f"blocks, base_rate, multi_grid: expected positive numbers, got {blocks}, {base_rate}, {tuple(multi_grid)}"
            )
        rates = [[base_rate * 2**b * m for m in multi_grid] for b in range(blocks)]
        super().__init__(*(nn.Sequential(*map(unit, of_block)) for of_block in rates))


def multi_grid(units: Iterable[nn.Module], rates: Sequence[int] = MULTI_GRID) -> None:
    """Multiply the dilation of each unit's convolutions by its own rate, in place.

    On top of what `to_output_stride` gave the block: at output stride 16 the last block of a ResNet has rate 2, and
    (1, 2, 4) makes its three units 2, 4, 8.

    Args:
        units: of the last block, in order.
        rates: one per unit.

    Raises:
        InputError: where the numbers of units and rates differ.

    >>> block = [torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2) for _ in range(3)]
    >>> multi_grid(block); [conv.dilation[0] for conv in block]
    [2, 4, 8]

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.
    """
    units = list(units)
    if len(units) != len(rates) or min(rates, default=0) < 1:
        raise InputError(f"rates: expected one positive number for each of {len(units)} units, got {tuple(rates)}")
    for unit, rate in zip(units, rates, strict=True):
        for name, module in unit.named_modules():
            # 1 x 1 convolutions have nothing to dilate, but their padding must not grow
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and max(module.kernel_size) > 1:
                dilate(module, rate, name)


def tap_diagnosis(input_size: int | tuple[int, int], rates: Sequence[Rate] = RATES, output_stride: int = 16) -> str:
    """What each 3 x 3 filter of a pyramid reads of a map, one line per rate, to be printed before a net is trained.

    Args:
        input_size: side of the image in pixels, or `(height, width)`.
        rates: one per filter, or `(down, across)`.
        output_stride: pixels per cell of the map.

    Raises:
        InputError: where a number is not positive.

    >>> print(tap_diagnosis(257, (6, 18)))
    map of 17 x 17 cells
    rate 6 x 6: all nine taps inside at 8.7 % of the positions
    rate 18 x 18: never more than the middle tap, a 1 x 1 filter; the map has 17 x 17 cells

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.
    """
    require_at_least(1, output_stride=output_stride)
    cells = tuple(-(-n // output_stride) for n in integers_per_axis("input_size", input_size, 2))
    side = " x ".join(map(str, cells))
    lines = [f"map of {side} cells"]
    for rate in rates:
        pair = integers_per_axis("rates", rate, 2)
        found = valid_taps((cells[0], cells[1]), (pair[0], pair[1]))
        said = f"all nine taps inside at {100 * found.whole:.1f} % of the positions"
        if found.alone == 1:
            said = f"never more than the middle tap, a 1 x 1 filter; the map has {side} cells"
        lines.append(f"rate {pair[0]} x {pair[1]}: {said}")
    return "\n".join(lines)


def pixel_loss(
    logits: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    ignore: int = 255,
) -> Float[Tensor, ""]:
    """DeepLabV3's loss: cross-entropy on the enlarged logits, so that no label is thrown away.

    Args:
        logits: `[batch, classes, height, width]`, at the size of the labels.
        labels: `[batch, height, width]`.
        ignore: the label that counts nothing.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.

    >>> pixel_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)).exp().round().item()
    2.0
    """
    return F.cross_entropy(logits, labels.long(), ignore_index=ignore)


class Phase(NamedTuple):
    """One of the two phases of the training; the defaults of `train_deeplabv3` are the paper's.

    Attributes:
        output_stride: of the net in this phase.
        steps: how many.
        lr: at the start.
        frozen_norms: whether the normalisations stay as they are: statistics, weights and biases.
    """

    output_stride: int
    steps: int
    lr: float
    frozen_norms: bool = False


class Phases(NamedTuple):
    """A trained net, and how it went.

    Attributes:
        net: at the output stride of the last phase.
        histories: of each phase.
    """

    net: DeepLabV3
    histories: tuple[History, ...]


PHASES = (Phase(16, 30_000, 0.007), Phase(8, 30_000, 0.001, frozen_norms=True))


def train_deeplabv3(
    net: DeepLabV3,
    images: Sequence[Labelled],
    *,
    phases: Sequence[Phase] = PHASES,
    batch: int = 16,
    crop: int = 513,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    norm_momentum: float = 3e-4,
    momentum: float = 0.9,
    weight_decay: float = 4e-5,
    power: float = 0.9,
    ignore: int = 255,
    seed: int = 0,
) -> Phases:
    """The paper's two phases: at output stride 16 with the normalisations learned, then at 8 with them frozen.

    Args:
        net: at the output stride of the first phase; it is trained, and a copy of it made denser in the second.
        images: `(image, labels)`, as the net takes them; sizes may differ.
        phases: of the training.
        batch: crops in a step.
        crop, scale, flip, ignore: see `random_crop`.
        norm_momentum: share of each batch in the running statistics of batch normalisation.
        momentum, weight_decay: of the descent; the rate falls by `poly_schedule` with `power`.
        seed: of the draws.

    Raises:
        InputError: where the net has another output stride than the first phase, or cannot be made denser.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 8, 1), torch.nn.Conv2d(8, 8, 3, 2, 1))
        >>> net = DeepLabV3(backbone, 8, classes=2, width=8, rates=(1, 2))
        >>> images = [(torch.randn(3, 40, 50) + c, torch.full((40, 50), c)) for c in (0, 1)]
        >>> phases = (Phase(16, 4, 0.01), Phase(8, 2, 0.001, frozen_norms=True))
        >>> net, histories = train_deeplabv3(net, images, phases=phases, batch=2, crop=33)
        >>> net.output_stride, net.head.aspp.rates, len(histories)
        (8, ((2, 2), (4, 4)), 2)

    Source: Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.

    Note:
        Momentum and weight decay were not found out; here they are those that such nets are often trained with.
    """
    if not phases or net.output_stride != phases[0].output_stride:
        raise InputError(
            f"phases: expected the first at the net's output stride {net.output_stride}, got "
            f"{[p.output_stride for p in phases]}"
        )
    histories = []
    for number, phase in enumerate(phases):
        if phase.output_stride != net.output_stride:
            image = images[0][0]
            net = net.at_output_stride(phase.output_stride, image.new_zeros(1, image.shape[0], crop, crop))
        norms = [
            m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
        ]
        own = {id(p) for m in norms for p in m.parameters(recurse=False)} if phase.frozen_norms else set()
        for m in norms:
            if isinstance(m, nn.modules.batchnorm._NormBase):
                m.momentum = norm_momentum
        sgd = torch.optim.SGD(
            [p for p in net.parameters() if id(p) not in own], phase.lr, momentum=momentum, weight_decay=weight_decay
        )
        histories.append(
            train_on_crops(
                net,
                images,
                partial(_phase_loss, net, norms if phase.frozen_norms else [], ignore),
                sgd,
                poly_schedule(sgd, phase.steps, power),
                steps=phase.steps,
                batch=batch,
                crop=crop,
                scale=scale,
                flip=flip,
                ignore=ignore,
                seed=seed + number,
            )
        )
    return Phases(net, tuple(histories))


def _phase_loss(
    net: DeepLabV3, frozen: Sequence[nn.Module], ignore: int, x: Tensor, labels: Tensor
) -> Float[Tensor, ""]:
    for norm in frozen:
        norm.eval()
    return pixel_loss(net(x), labels, ignore)


def _unit(in_channels: int, out_channels: int, norm: Norm, rate: tuple[int, ...] | None = None) -> nn.Sequential:
    if rate is None:
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    else:
        down, across = rate
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=(down, across), dilation=(down, across), bias=False)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU())
