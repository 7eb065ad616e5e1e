"""Sets of tiles of which one is a digit and the others are distractors, and the small network that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.pool import Pool
from cenote.study.harness.batches import stacked
from cenote.study.harness.data import PIXELS, Digits, digits
from cenote.study.harness.training import Together, cross_entropy, epochs, fit, steps_of
from cenote.study.harness.verdict import Size

WIDTH = 48
BATCH = 128
LEARNING_RATE = 3e-3
EPOCHS: dict[Size, int] = {"smoke": 2, "small": 30, "full": 30}
DRAWS: dict[Size, int] = {"smoke": 1, "small": 3, "full": 3}


class Tiles(NamedTuple):
    """Sets of tiles of which one is a digit."""

    x: Float[Tensor, "items tiles pixels"]
    y: Int[Tensor, "items"]
    place: Int[Tensor, "items"]


def distractor_tiles(source: Digits, draws: int, generator: torch.Generator, tiles: int = 16) -> Tiles:
    """`draws` sets for every digit of `source`: it stands at a random place, the other tiles are digits with shuffled pixels.

    >>> sets = distractor_tiles(digits("test"), 1, torch.Generator().manual_seed(0))
    >>> sets.x.shape, sets.place.max().item() < 16
    (torch.Size([597, 16, 64]), True)
    """
    own = torch.arange(len(source.y)).repeat(draws)
    items = len(own)
    others = torch.randint(1, len(source.y), (items, tiles), generator=generator)
    others = (own.unsqueeze(1) + others) % len(source.y)
    shuffle = torch.rand(items, tiles, PIXELS, generator=generator).argsort(-1)
    x = source.x[others].gather(-1, shuffle)
    place = torch.randint(tiles, (items,), generator=generator)
    x[torch.arange(items), place] = source.x[own]
    return Tiles(x, source.y[own], place)


def train_and_test(seeds: tuple[int, ...], size: Size) -> tuple[Tiles, Tiles]:
    """Tiles drawn afresh for each seed, stacked: several sets per training digit, one per test digit."""
    return _over_seeds(digits("train"), DRAWS[size], seeds), _over_seeds(
        digits("test"), 1, tuple(s + 1000 for s in seeds)
    )


class TileClassifier(nn.Module):
    """Tiles -> features -> one vector -> digit."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.pool = pool
        self.classifier = nn.Linear(pool.out_dim, 10)

    def forward(self, x: Float[Tensor, "batch tiles pixels"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.pool(self.encoder(x)))


def classifiers(
    pool: Callable[[], Pool],
    train: Tiles,
    seeds: tuple[int, ...],
    size: Size,
    own_rates: Mapping[str, float] | None = None,
) -> Together:
    """One trained classifier per seed, each on the tiles of its seed; `own_rates` as in `fit`."""
    model = Together(lambda: TileClassifier(pool()), seeds)
    steps = steps_of(train.y.shape[1], BATCH, EPOCHS[size])
    fit(model, epochs(train.x, train.y, BATCH, seeds), cross_entropy, steps, LEARNING_RATE, own_rates=own_rates)
    return model


def _over_seeds(source: Digits, draws: int, seeds: tuple[int, ...]) -> Tiles:
    return stacked(distractor_tiles(source, draws, torch.Generator().manual_seed(s)) for s in seeds)
