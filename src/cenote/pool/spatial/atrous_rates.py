"""Choose atrous rates by the size of the image, and see where a dense net looks.

Source: Kim, Choi, Jang, Kim, "Resolution-Aware Design of Atrous Rates for Semantic Segmentation Networks", 2023.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_all_positive, require_at_least
from cenote.pool.spatial.axes import integers_per_axis

COVERAGE = 0.55


class ValidTaps(NamedTuple):
    """How much of a 3 x 3 atrous filter lies inside of a map.

    Attributes:
        taps: share of its taps, over all positions.
        whole: share of the positions at which all nine are.
        alone: share of the positions at which only the middle one is, so that the filter is a 1 x 1 filter there.
    """

    taps: float
    whole: float
    alone: float


def valid_taps(size: int | tuple[int, int], rate: int | tuple[int, int]) -> ValidTaps:
    """How many taps of a 3 x 3 filter lie inside of a map; those outside read zero padding.

    Along an axis of `S` cells both outer taps are inside at the share `max(0, 1 - 2r/S)` of the positions, at least one at
    `min(1, 2 (1 - r/S))`, none from `r = S` on.

    Args:
        size: side of the map in cells (image over output stride), or `(height, width)`.
        rate: of the filter, or one per axis.

    Example:
        >>> valid_taps(33, 18).whole, round(valid_taps(33, 18).taps, 2), valid_taps(16, 16).alone
        (0.0, 0.4, 1.0)

    Source: Kim et al., "Resolution-Aware Design of Atrous Rates", 2023 (the geometry is exact).
    """
    taps = whole = alone = 1.0
    for n, r in zip(integers_per_axis("size", size, 2), integers_per_axis("rate", rate, 2), strict=True):
        side = max(0.0, 1 - r / n)
        both = max(0.0, 1 - 2 * r / n)
        taps *= (1 + 2 * side) / 3
        whole *= both
        alone *= 1 - min(1.0, 2 * side)
    return ValidTaps(taps, whole, alone)


@overload
def recommend_rates(
    input_size: int, output_stride: int = ..., branches: int = ..., coverage: float = ...
) -> tuple[int, ...]: ...
@overload
def recommend_rates(
    input_size: tuple[int, int], output_stride: int = ..., branches: int = ..., coverage: float = ...
) -> tuple[tuple[int, int], ...]: ...
def recommend_rates(
    input_size: int | tuple[int, int],
    output_stride: int = 16,
    branches: int = 3,
    coverage: float = COVERAGE,
) -> tuple[int, ...] | tuple[tuple[int, int], ...]:
    """Atrous rates for a pyramid on images of this size.

    With a map of `S = ceil(input_size / output_stride)` cells the largest rate is `R = round(coverage S)`, the others
    `round(i R / branches)`; all differ and are at least 1. At 513 pixels and output stride 16 that is DeepLab's (6, 12, 18).

    Args:
        input_size: side of the image that the head sees, in training and later, in pixels; or `(height, width)`.
        output_stride: pixels per cell of the map.
        branches: number of rates.
        coverage: the largest rate as a share of the map's side; from 0.5 (its outer taps reach the border as seen from the
            middle) to 0.75 is sensible.

    Returns:
        Rates, rising; for two sides `(down, across)` each.

    Example:
        >>> recommend_rates(513), recommend_rates(512, 8), recommend_rates(128, 8)
        ((6, 12, 18), (12, 23, 35), (3, 6, 9))
        >>> recommend_rates((512, 1024))
        ((6, 12), (12, 23), (18, 35))

    Source: Kim et al., "Resolution-Aware Design of Atrous Rates for Semantic Segmentation Networks", 2023.

    Note:
        The paper's abstract says that the best rates follow the input size; its numbers were not available. The rule is our
        derivation from the geometry, checked by `cenote study atrous-rates`.
    """
    if isinstance(input_size, tuple):
        down, across = (
            recommend_rates(n, output_stride, branches, coverage)
            for n in integers_per_axis("input_size", input_size, 2)
        )
        return tuple(zip(down, across, strict=True))
    require_at_least(1, input_size=input_size, output_stride=output_stride, branches=branches)
    if coverage <= 0:
        raise InputError(f"coverage: expected a positive share of the map's side, got {coverage}")
    largest = round(coverage * -(-input_size // output_stride))
    rates: list[int] = []
    for i in range(1, branches + 1):
        rates.append(max(round(i * largest / branches), rates[-1] + 1 if rates else 1))
    return tuple(rates)


class Sweep(NamedTuple):
    """Scores of several multipliers.

    Attributes:
        best: rates with the largest score.
        rates: what was tried.
        reach: the largest rate of each as a share of the map's side; to plot the scores against.
        scores: as `score` gave them.
        rule: rates of `recommend_rates`, to mark among those tried.
        rule_reach: their largest as a share of the map's side.
        inside: share of the taps of each that lie inside of the map, at the size of test.
    """

    best: tuple[int, ...]
    rates: tuple[tuple[int, ...], ...]
    reach: tuple[float, ...]
    scores: tuple[float, ...]
    rule: tuple[int, ...]
    rule_reach: float
    inside: tuple[float, ...]


def sweep_rates(
    score: Callable[[tuple[int, ...]], float],
    input_size: int,
    output_stride: int = 16,
    multipliers: Sequence[int] = (1, 2, 3, 4, 6, 8, 12),
    branches: int = 3,
    test_size: int | None = None,
) -> Sweep:
    """Try rates `(g, 2g, ...)` for several `g`; for when a rule is not enough.

    Warns where the net will see images of another size than in training, for then other taps lie inside of the map.

    Args:
        score: rates to a validation score, larger is better: trains and evaluates the user's own net.
        input_size, output_stride, branches: as in `recommend_rates`.
        multipliers: the `g`.
        test_size: side of the images that the net will see, where it is another.

    Example:
        >>> sweep_rates(lambda rates: -abs(rates[-1] - 10), 256, multipliers=(1, 3, 6)).best
        (3, 6, 9)

    Source: Kim et al., "Resolution-Aware Design of Atrous Rates", 2023.
    """
    require_all_positive(multipliers=multipliers)
    side = -(-input_size // output_stride)
    rates = tuple(tuple(g * i for i in range(1, branches + 1)) for g in multipliers)
    scores = tuple(float(score(r)) for r in rates)
    chosen = max(range(len(rates)), key=scores.__getitem__)
    trained = [_inside(side, r) for r in rates]
    inside = trained if test_size is None else [_inside(-(-test_size // output_stride), r) for r in rates]
    if test_size not in (None, input_size):
        warnings.warn(
            f"test_size: at {test_size} pixels {inside[chosen]:.0%} of the taps of the best rates lie inside of the map, in "
            f"training at {input_size} {trained[chosen]:.0%}; choose rates at the size that the net will see",
            stacklevel=2,
        )
    rule = recommend_rates(input_size, output_stride, branches)
    reach = tuple(r[-1] / side for r in rates)
    return Sweep(rates[chosen], rates, reach, scores, rule, rule[-1] / side, tuple(inside))


class Ties(NamedTuple):
    """The best of several settings over seeds, and its equals.

    Attributes:
        best: the setting with the largest mean score.
        tied: all settings that may be as good: the 95 % interval of the paired difference over the seeds holds 0; with `best`.
    """

    best: int
    tied: tuple[int, ...]


def best_with_ties(scores: Float[Tensor, "seeds settings"]) -> Ties:
    """Which setting is best, and which cannot be told from it: of neighbouring rates the best is partly chance.

    Args:
        scores: of each seed at each setting, larger is better; at least two seeds.

    Example:
        >>> best_with_ties(torch.tensor([[0.1, 0.80, 0.82], [0.2, 0.83, 0.81], [0.1, 0.81, 0.82]]))
        Ties(best=2, tied=(1, 2))

    Source: ours, for the sweeps of Kim et al., 2023.
    """
    import scipy.stats

    seeds = len(scores)
    if scores.dim() != 2 or seeds < 2:
        raise InputError(f"scores: expected [seeds, settings] with at least two seeds, got {tuple(scores.shape)}")
    best = int(scores.mean(0).argmax())
    behind = (scores[:, best : best + 1] - scores).double()
    half = float(scipy.stats.t.ppf(0.975, seeds - 1)) * behind.std(0) / seeds**0.5
    return Ties(best, tuple((behind.mean(0) <= half).nonzero().flatten().tolist()))


def _inside(side: int, rates: tuple[int, ...]) -> float:
    return sum(valid_taps(side, r).taps for r in rates) / len(rates)


def effective_receptive_field(
    model: nn.Module | Callable[[Tensor], Tensor],
    images: Float[Tensor, "images channels height width"],
    position: tuple[int, int] | None = None,
    batch: int = 8,
) -> Float[Tensor, "height width"]:
    """Where one output of a dense net looks: mean size of its gradient, pixel by pixel.

    `E(p) = mean_images sum_channels |d (sum_classes y(position)) / d x(p)|`, divided by its largest value. With an atrous
    pyramid the map shows nine spots per rate around the position, `rate` cells away along rows, columns and diagonals.

    Args:
        model: `[batch, channels, height, width]` to `[batch, classes, h, w]`; run in eval mode and left as it was.
        images: at the size of interest; a few dozen make the map smooth.
        position: `(row, column)` of the output; default its middle.
        batch: images at a time.

    Returns:
        Values from 0 to 1, on the CPU; all 0 where the output depends on nothing.

    Raises:
        InputError: where images or output are no maps, or the position is outside.

    Example:
        >>> conv = torch.nn.Conv2d(1, 1, 3, padding=4, dilation=4)
        >>> field = effective_receptive_field(conv, torch.randn(2, 1, 16, 16))
        >>> field.shape, int((field > 0).sum())
        (torch.Size([16, 16]), 9)

    Source: Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016, for
        segmentation as in Kim et al., 2023.

    Note:
        The definition follows the usual one; the paper's own was not available.
    """
    if images.dim() != 4 or 0 in images.shape:
        raise InputError(f"images: expected [images, channels, height, width], at least one, got {tuple(images.shape)}")
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    total = images.new_zeros(images.shape[2:], dtype=torch.float64)
    try:
        for part in images.detach().split(max(1, batch)):
            x = part.clone().requires_grad_()
            with torch.enable_grad():
                y = model(x)
                if not isinstance(y, Tensor) or y.dim() != 4:
                    came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                    raise InputError(f"model: expected an output [batch, classes, h, w], got {came}")
                row, column = position or (y.shape[2] // 2, y.shape[3] // 2)
                if not (0 <= row < y.shape[2] and 0 <= column < y.shape[3]):
                    raise InputError(
                        f"position: expected one inside of the output {tuple(y.shape[2:])}, got {position}"
                    )
                chosen = y[:, :, row, column].sum()
            if chosen.requires_grad:
                (g,) = torch.autograd.grad(chosen, x, allow_unused=True)
                total += 0 if g is None else g.abs().sum((0, 1))
    finally:
        for module, mode in modes:
            module.training = mode
    return (total / total.max().clamp(min=torch.finfo(total.dtype).tiny)).to(images.dtype).cpu()


def receptive_extent(
    field: Float[Tensor, "height width"], position: tuple[int, int] | None = None, share: float = 0.95
) -> float:
    """Radius, in pixels along the longer axis, of the square around `position` that holds this share of a receptive field.

    Args:
        field: as `effective_receptive_field` gives it.
        position: `(row, column)` in pixels; default the middle.
        share: of the sum of the field.

    Example:
        >>> field = torch.zeros(9, 9)
        >>> field[4, 1] = field[4, 7] = 1
        >>> receptive_extent(field)
        3.0

    Source: Kim et al., 2023, for the field; this summary is ours.
    """
    if not 0 < share <= 1:
        raise InputError(f"share: expected a number above 0 and up to 1, got {share}")
    height, width = field.shape
    row, column = position or (height // 2, width // 2)
    away = torch.maximum(
        (torch.arange(height) - row).abs().unsqueeze(1).expand(height, width),
        (torch.arange(width) - column).abs().expand(height, width),
    )
    mass = torch.zeros(max(height, width) + 1, dtype=torch.float64)
    mass.index_add_(0, away.flatten(), field.detach().cpu().double().flatten())
    if float(mass.sum()) == 0:
        return 0.0
    held = mass.cumsum(0) / mass.sum()
    return float((held < share - 1e-12).sum())


def receptive_peaks(field: Float[Tensor, "height width"], least: float = 0.5) -> list[tuple[int, int]]:
    """`(row, column)` of the peaks of a receptive field, the strongest first: none of the eight pixels around exceeds them.

    Args:
        field: as `effective_receptive_field` gives it.
        least: share of the largest value that a peak has at least, above 0 and up to 1.

    Example:
        >>> field = torch.zeros(9, 9)
        >>> field[4, 4], field[4, 1], field[4, 2], field[0, 8] = 1.0, 0.8, 0.7, 0.1
        >>> receptive_peaks(field)
        [(4, 4), (4, 1)]

    Source: Kim et al., 2023, for the field; this summary is ours.
    """
    if not 0 < least <= 1:
        raise InputError(f"least: expected a share above 0 and up to 1, got {least}")
    around = torch.nn.functional.max_pool2d(field.detach()[None, None], 3, 1, 1)[0, 0]
    found = ((field == around) & (field > 0) & (field >= least * field.max())).nonzero()
    return sorted(map(tuple, found.tolist()), key=lambda at: -float(field[at]))


def star_share(
    field: Float[Tensor, "height width"],
    rates: Sequence[int],
    output_stride: int = 1,
    position: tuple[int, int] | None = None,
) -> float:
    """Share of a receptive field's sum that lies where a pyramid of such rates would put it.

    That is at the nine offsets `(i r s, j r s)`, `i, j` of -1, 0 and 1, of each rate `r` at the output stride `s`, and within
    half a stride of each; offsets outside of the field count for nothing.

    Args:
        field: as `effective_receptive_field` gives it.
        rates: of the 3 x 3 branches.
        output_stride: pixels per cell of the map.
        position: `(row, column)` in pixels; default the middle.

    Example:
        >>> conv = torch.nn.Conv2d(1, 1, 3, padding=4, dilation=4)
        >>> field = effective_receptive_field(conv, torch.randn(2, 1, 16, 16))
        >>> star_share(field, (4,)), 0 < star_share(field, (3,)) < 0.5
        (1.0, True)

    Source: the pattern of Kim et al., 2023; its share is ours.
    """
    require_all_positive(rates=rates)
    require_at_least(1, output_stride=output_stride)
    height, width = field.shape
    row, column = position or (height // 2, width // 2)
    inside, near = torch.zeros(height, width, dtype=torch.bool), output_stride // 2
    for r in rates:
        for i, j in itertools.product((-1, 0, 1), repeat=2):
            y, x = row + i * r * output_stride, column + j * r * output_stride
            if 0 <= y < height and 0 <= x < width:
                inside[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1] = True
    mass = field.detach().cpu().double()
    return float(mass[inside].sum() / mass.sum()) if float(mass.sum()) > 0 else 0.0
