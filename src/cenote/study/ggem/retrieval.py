"""Retrieval of digits of classes that were never trained, by pooled features of a small convolutional net."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.pool import Pool
from cenote.study.harness import Size
from cenote.study.harness.data import Digits
from cenote.study.harness.training import Together, cross_entropy, epochs, fit, steps_of
from cenote.study.harness.window_cnn import images, on_canvas

SIDE, TRAINED, WIDTH = 16, 6, 32
BATCH, LEARNING_RATE = 64, 3e-3
EPOCHS: dict[Size, int] = {"smoke": 1, "small": 15, "full": 40}
ITEMS: dict[Size, int] = {"smoke": 128, "small": 2000, "full": 2000}


class Descriptor(nn.Module):
    """Two convolutions, a pooling of the map, length 1; in training a classifier of cosines follows."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, WIDTH, 3, padding=1), nn.ReLU()
        )
        self.pool = pool
        self.classifier = nn.Linear(WIDTH, TRAINED, bias=False)

    def forward(self, x: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch classes"]:
        return 16 * self.describe(x) @ F.normalize(self.classifier.weight, dim=1).T

    def describe(self, x: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch width"]:
        """What is compared."""
        return F.normalize(self.pool(self.trunk(x)), dim=1)


def retrieved(pool: Callable[[], Pool], seeds: tuple[int, ...], size: Size) -> tuple[float, ...]:
    """Mean average precision of each seed: trained on digits 0 to 5, asked for 6 to 9, each one a query for all others."""
    x, y = (torch.cat(part) for part in zip(*images(), strict=True))
    seen = y < TRAINED
    known, others = (Digits(x[s][: ITEMS[size]], y[s][: ITEMS[size]]) for s in (seen, ~seen))
    train, test = on_canvas(known, SIDE, seeds), on_canvas(others, SIDE, tuple(s + 1000 for s in seeds))
    model = Together(lambda: Descriptor(pool()), seeds)
    steps = steps_of(len(known.y), BATCH, EPOCHS[size])
    fit(model, epochs(train.x, train.y, BATCH, seeds), cross_entropy, steps, LEARNING_RATE)
    scores = []
    for net, x in zip(model.modules(), test.x, strict=True):
        with torch.no_grad():
            scores.append(mean_average_precision(net.describe(x), others.y))
    return tuple(scores)


def mean_average_precision(descriptors: Float[Tensor, "items width"], y: Int[Tensor, "items"]) -> float:
    """Each item asks for the others of its class, by inner products.

    >>> mean_average_precision(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1]))
    1.0
    """
    similar = descriptors @ descriptors.T
    similar.fill_diagonal_(-torch.inf)
    order = similar.argsort(1, descending=True)[:, :-1]
    right = (y[order] == y.unsqueeze(1)).double()
    precision = right.cumsum(1) / torch.arange(1, len(y), dtype=torch.float64)
    return float(((precision * right).sum(1) / right.sum(1).clamp(min=1)).mean())
