"""Handwritten digits, raw and behind a frozen backbone: nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.features.dataset import SPLITS
from cenote.features.digits_mae import DigitsEncoder

TRAIN = 1200
PIXELS = 64


class Digits(NamedTuple):
    """1,797 handwritten digits of 8 x 8 pixels in [0, 1]; the first 1,200 are for training."""

    x: Float[Tensor, "items *pixels"]
    y: Int[Tensor, "items"]


@cache
def _all_digits() -> Digits:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Digits(torch.from_numpy(x).float() / 16, torch.from_numpy(y).long())


def digits(split: str) -> Digits:
    """The digits for `train` (0 to 1199) or `test` (1200 to 1796).

    >>> len(digits("train").y), len(digits("test").y)
    (1200, 597)
    """
    x, y = _all_digits()
    return Digits(x[:TRAIN], y[:TRAIN]) if split == "train" else Digits(x[TRAIN:], y[TRAIN:])


class Backbone(NamedTuple):
    """A frozen masked autoencoder and the digits it goes with; its training images are among the 1,200 training items."""

    encoder: DigitsEncoder
    train: Digits
    test: Digits


def backbone() -> Backbone:
    """A fresh copy of the package's digits backbone; images as `[items, 8, 8]`.

    >>> backbone().train.x.shape, backbone().test.x.shape
    (torch.Size([1200, 8, 8]), torch.Size([597, 8, 8]))
    """
    from cenote.features import embedded

    x, y = _all_digits()
    x, testing = x.view(-1, 8, 8), embedded.digits().split == SPLITS.index("test")
    return Backbone(embedded.backbone(), Digits(x[~testing], y[~testing]), Digits(x[testing], y[testing]))
