"""Photographs that come with scikit-learn, and how close an image is to another."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cenote.study.harness.verdict import Size

CROPS: dict[Size, int] = {"smoke": 2, "small": 16, "full": 64}
CROP = 128
LEVELS = 255.0
WINDOW, SIGMA = 11, 1.5


@cache
def photographs() -> tuple[Float[Tensor, "3 height width"], ...]:
    """The two photographs that come with scikit-learn, in levels of 0 to 255.

    >>> [tuple(photo.shape) for photo in photographs()]
    [(3, 427, 640), (3, 427, 640)]
    """
    from sklearn.datasets import load_sample_images

    return tuple(torch.tensor(image).movedim(-1, 0).float() for image in load_sample_images().images)


def crop(photo: Float[Tensor, "3 height width"], side: int, generator: torch.Generator) -> Float[Tensor, "3 side side"]:
    """A square of it at a random place."""
    top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in photo.shape[1:])
    return photo[:, top : top + side, left : left + side]


def crops_of(seed: int, count: int) -> Float[Tensor, "crops 3 side side"]:
    """In [0, 1], half of them from either photograph."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([crop(photographs()[i % 2], CROP, generator) for i in range(count)]) / LEVELS


def ssim(a: Float[Tensor, "items channels height width"], b: Float[Tensor, "items channels height width"]) -> float:
    """Mean structural similarity of images in [0, 1]: Gaussian windows of 11 x 11, sigma 1.5, as by Wang et al. (2004).

    >>> round(ssim(torch.ones(1, 1, 16, 16), torch.ones(1, 1, 16, 16)), 6)
    1.0
    """
    at = torch.arange(WINDOW) - WINDOW // 2
    line = torch.exp(-at.square() / (2 * SIGMA**2))
    kernel = torch.outer(line, line) / line.sum() ** 2

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1).unsqueeze(1), kernel[None, None].to(x.dtype))

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a.square(), blurred(b * b) - mean_b.square()
    both = blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))).mean())


def psnr(a: Float[Tensor, "items channels height width"], b: Float[Tensor, "items channels height width"]) -> float:
    """Peak signal to noise ratio of images in [0, 1], in decibels."""
    return float(-10 * (a - b).square().mean().log10())
