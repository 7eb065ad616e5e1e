"""A small convolutional net on digits whose two window poolings are exchanged, and digits at any place of a canvas."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.study.harness.data import Digits, digits
from cenote.study.harness.training import Together, cross_entropy, epochs, fit, steps_of
from cenote.study.harness.verdict import Size

Build = Callable[[], nn.Module]

TRAIN = 600
BATCH = 64
LEARNING_RATE = 3e-3
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 25, "full": 100}
SIDE = 8


class WindowCNN(nn.Module):
    """conv16 - pool 2 - conv32 - pool 2 - linear, on 8 x 8 pixels."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.pool1 = first
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.pool2 = second
        self.classifier = nn.Linear(32 * 4, 10)

    def forward(self, x: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch classes"]:
        x = self.pool1(torch.relu(self.conv1(x)))
        return self.classifier(self.pool2(torch.relu(self.conv2(x))).flatten(1))


def images(train: int = TRAIN) -> tuple[Digits, Digits]:
    """The first `train` digits for training and all others for testing, as `[items, 1, 8, 8]`.

    >>> [len(part.y) for part in images()]
    [600, 1197]
    """
    x, y = (torch.cat(parts) for parts in zip(digits("train"), digits("test"), strict=True))
    x = x.view(-1, 1, SIDE, SIDE)
    return Digits(x[:train], y[:train]), Digits(x[train:], y[train:])


def over_seeds(data: Digits, seeds: tuple[int, ...]) -> Digits:
    """The same items for every seed."""
    return Digits(data.x.expand(len(seeds), *data.x.shape), data.y.expand(len(seeds), *data.y.shape))


def trained_cnn(first: Build, second: Build, seeds: tuple[int, ...], size: Size) -> Together:
    """One trained net per seed."""
    x, y = over_seeds(images()[0], seeds)
    model = Together(lambda: WindowCNN(first(), second()), seeds)
    fit(model, epochs(x, y, BATCH, seeds), cross_entropy, steps_of(TRAIN, BATCH, EPOCHS[size]), LEARNING_RATE)
    return model


class Canvas(NamedTuple):
    """Digits at random places of black canvases; `place` is the row and column of the digit's corner."""

    x: Float[Tensor, "seeds items 1 side side"]
    y: Int[Tensor, "seeds items"]
    place: Int[Tensor, "seeds items 2"]


def on_canvas(data: Digits, side: int, seeds: tuple[int, ...]) -> Canvas:
    """Every digit once, at a place drawn afresh for each seed.

    >>> on_canvas(images()[1], 14, (0, 1)).x.shape
    torch.Size([2, 1197, 1, 14, 14])
    """
    items = len(data.y)
    x, places = data.x.new_zeros(len(seeds), items, 1, side, side), []
    for i, seed in enumerate(seeds):
        place = torch.randint(side - SIDE + 1, (items, 2), generator=torch.Generator().manual_seed(seed))
        rows, columns = (place[:, axis, None] + torch.arange(SIDE) for axis in (0, 1))
        x[i, torch.arange(items)[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = data.x[:, 0]
        places.append(place)
    return Canvas(x, over_seeds(data, seeds).y, torch.stack(places))
