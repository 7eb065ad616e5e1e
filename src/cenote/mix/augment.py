"""What training does to images and labels, from a generator of its own: mixing pairs, erasing, random changes, smoothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
LEVELS = 10
"""Magnitudes go from 0 to this."""


def smoothed(labels: Int[Tensor, "batch"], classes: int, smoothing: float = 0.1) -> Float[Tensor, "batch classes"]:
    """Each label as a distribution: `smoothing` of it over all classes alike.

    >>> smoothed(torch.tensor([1]), 2, 0.1).tolist()
    [[0.05000000074505806, 0.949999988079071]]
    """
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mixed_pairs(
    images: Images,
    targets: Float[Tensor, "batch classes"],
    mixup: float,
    cutmix: float,
    generator: torch.Generator,
) -> tuple[Images, Float[Tensor, "batch classes"]]:
    """Each image and its target with those of the batch read backwards: a weighted sum, or a rectangle cut in.

    Args:
        images, targets: a batch.
        mixup, cutmix: the Beta distribution's parameter of either; 0 for never, one of both by chance where both are given.
        generator: of the draws.
    """
    if not mixup and not cutmix:
        return images, targets
    cuts = bool(cutmix) and (not mixup or float(torch.rand((), generator=generator)) < 0.5)
    share = _beta(cutmix if cuts else mixup, generator)
    other = images.flip(0)
    if cuts:
        height, width = images.shape[2:]
        tall, wide = (int(n * (1 - share) ** 0.5) for n in (height, width))
        y, x = (int(torch.randint(n, (), generator=generator)) for n in (height, width))
        rows = slice(max(y - tall // 2, 0), min(y + tall - tall // 2, height))
        columns = slice(max(x - wide // 2, 0), min(x + wide - wide // 2, width))
        images = images.clone()
        images[:, :, rows, columns] = other[:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    else:
        images = share * images + (1 - share) * other
    return images, share * targets + (1 - share) * targets.flip(0)


def erased(images: Images, probability: float, generator: torch.Generator) -> Images:
    """A rectangle of noise in some of the images: 2 to 33 % of the area, up to three times as long as broad."""
    out = images.clone()
    height, width = images.shape[2:]
    for i in range(len(images)):
        if float(torch.rand((), generator=generator)) >= probability:
            continue
        area = height * width * _between(0.02, 1 / 3, generator)
        aspect = 3 ** _between(-1, 1, generator)
        tall, wide = min(round((area * aspect) ** 0.5), height), min(round((area / aspect) ** 0.5), width)
        y = int(torch.randint(height - tall + 1, (), generator=generator))
        x = int(torch.randint(width - wide + 1, (), generator=generator))
        noise = torch.randn(images.shape[1], tall, wide, generator=generator).to(images)
        out[i, :, y : y + tall, x : x + wide] = noise
    return out


def rand_augment(images: Images, magnitude: float, generator: torch.Generator, changes: int = 2) -> Images:
    """So many changes of each image, drawn at random, all of one strength.

    Args:
        images: values near 0 to 1.
        magnitude: from 0 to 10.
        generator: of the draws.
        changes: one after the other.

    Source:
        Cubuk et al. 2020, arXiv 1909.13719; of its changes equalisation of histograms is left out.
    """
    out = []
    for image in images:
        x = image.unsqueeze(0)
        for _ in range(changes):
            change = CHANGES[int(torch.randint(len(CHANGES), (), generator=generator))]
            sign = 1 if float(torch.rand((), generator=generator)) < 0.5 else -1
            x = change(x, sign * magnitude / LEVELS)
        out.append(x)
    return torch.cat(out)


def warped(
    x: Images, turn: float = 0.0, shear: tuple[float, float] = (0.0, 0.0), shift: tuple[float, float] = (0.0, 0.0)
) -> Images:
    """Images turned (in radians), sheared and shifted (in half widths), zeros where there was nothing."""
    angle = torch.tensor(turn)
    cos, sin = float(angle.cos()), float(angle.sin())
    matrix = [
        [cos + shear[0] * sin, shear[0] * cos - sin, shift[0]],
        [sin + shear[1] * cos, cos - shear[1] * sin, shift[1]],
    ]
    grid = F.affine_grid(torch.tensor([matrix]).to(x).expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def blended(x: Images, other: Tensor, share: float) -> Images:
    """`other + (1 + share) (x - other)`: towards it below 0, away from it above."""
    return other + (1 + share) * (x - other)


def _sharper(x: Images, by: float) -> Tensor:
    return blended(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), by)


def _stretched(x: Images, by: float) -> Tensor:  # noqa: ARG001
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def _posterized(x: Images, by: float) -> Tensor:
    steps = 2 ** round(8 - 4 * abs(by)) - 1
    return (x * steps).round() / steps


CHANGES: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda x, _by: x,
    lambda x, by: warped(x, turn=by * torch.pi / 6),
    lambda x, by: warped(x, shear=(0.3 * by, 0)),
    lambda x, by: warped(x, shear=(0, 0.3 * by)),
    lambda x, by: warped(x, shift=(0.9 * by, 0)),
    lambda x, by: warped(x, shift=(0, 0.9 * by)),
    lambda x, by: blended(x, torch.zeros_like(x), 0.9 * by),
    lambda x, by: blended(x, x.mean((1, 2, 3), keepdim=True), 0.9 * by),
    lambda x, by: blended(x, x.mean(1, keepdim=True), 0.9 * by),
    lambda x, by: torch.where(x >= 1 - abs(by), 1 - x, x),
    _sharper,
    _stretched,
    _posterized,
)


def _beta(alpha: float, generator: torch.Generator) -> float:
    # two Gamma draws by their logarithms would underflow for small alpha; a Beta draw by Johnk's method does not
    while True:
        u, v = (float(torch.rand((), generator=generator, dtype=torch.float64)) ** (1 / alpha) for _ in range(2))
        if 0 < u + v <= 1:
            return u / (u + v)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
