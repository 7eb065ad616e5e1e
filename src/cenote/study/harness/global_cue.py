"""Noise images in which a patch says what every pixel has to answer, and the small net that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.study.harness.batches import stacked
from cenote.study.harness.training import Batch, Together, fit

COLOURS = 3
NOISE = 0.5
WIDTH = 24
BATCH = 16
LEARNING_RATE = 4e-3

Scene = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


class Scenes(NamedTuple):
    """Images and the colour that each pixel has to answer."""

    x: Float[Tensor, "items 3 side side"]
    y: Int[Tensor, "items side side"]


def one_patch(items: int, side: int, generator: torch.Generator) -> Scenes:
    """One patch, a quarter as wide as the image; every pixel answers its colour.

    >>> x, y = one_patch(2, 16, torch.Generator().manual_seed(0))
    >>> x.shape, y.shape, bool((y == y[:, :1, :1]).all())
    (torch.Size([2, 3, 16, 16]), torch.Size([2, 16, 16]), True)
    """
    return _painted(items, side, 1, generator)


def patch_per_band(items: int, side: int, generator: torch.Generator) -> Scenes:
    """Four bands of rows with a patch each; every pixel answers the colour of its own band, which no image mean can tell.

    >>> y = patch_per_band(2, 16, torch.Generator().manual_seed(0)).y
    >>> bool((y == y[:, :, :1]).all()), bool((y == y[:, :1]).all())
    (True, False)
    """
    return _painted(items, side, 4, generator)


class DenseNet(nn.Module):
    """Two 3 x 3 convolutions, then a head to scores per pixel."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()
        )
        self.head = head

    def forward(self, x: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch colours side side"]:
        return self.head(self.stem(x))


def trained(
    head: Callable[[], nn.Module], scene: Scene, side: int, seeds: tuple[int, ...], steps: int, tests: int = 200
) -> tuple[Together, tuple[float, ...]]:
    """One net per seed, trained on fresh scenes, and its pixel accuracy on `tests` others."""
    model = Together(lambda: DenseNet(head()), seeds, in_turn=True)
    batches = _batches(scene, side, seeds)
    fit(model, batches, pixel_cross_entropy, steps, LEARNING_RATE, optimiser=torch.optim.Adam)
    model.base.eval()
    shares = []
    for i, seed in enumerate(seeds):
        x, y = scene(tests, side, torch.Generator().manual_seed(seed + 1000))
        with torch.no_grad():
            guesses = model.module(i)(x).argmax(1)
        shares.append(float((guesses == y).double().mean()))
    return model, tuple(shares)


def pixel_cross_entropy(
    logits: Float[Tensor, "seeds batch colours h w"], y: Int[Tensor, "seeds batch h w"]
) -> Float[Tensor, ""]:
    """Mean over seeds, items and pixels."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(0, 1))


def _batches(scene: Scene, side: int, seeds: tuple[int, ...]) -> Iterator[Batch]:
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    while True:
        yield stacked(scene(BATCH, side, g) for g in generators)


def _painted(items: int, side: int, bands: int, generator: torch.Generator) -> Scenes:
    patch = side // 4
    x = NOISE * torch.randn(items, COLOURS, side, side, generator=generator)
    y = torch.zeros(items, side, side, dtype=torch.long)
    rows = torch.arange(side)
    for band in range(bands):
        first, last = band * side // bands, (band + 1) * side // bands
        colour = torch.randint(COLOURS, (items,), generator=generator)
        top = torch.randint(first, last - patch + 1, (items,), generator=generator)
        left = torch.randint(side - patch + 1, (items,), generator=generator)
        down, across = ((rows >= corner.unsqueeze(1)) & (rows < corner.unsqueeze(1) + patch) for corner in (top, left))
        inside = down.unsqueeze(2) & across.unsqueeze(1)
        x[torch.arange(items), colour] += inside
        y[:, first:last] = colour[:, None, None]
    return Scenes(x, y)
