"""Measures of maps against true masks, per word."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError


def pixel_accuracy(masks: Bool[Tensor, "words pixels"], true: Bool[Tensor, "words pixels"]) -> Float[Tensor, "words"]:
    """The share of pixels at which a mask says what is true.

    >>> pixel_accuracy(torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, False, False]])).tolist()
    [0.75]
    """
    return (masks == true).double().mean(1)


def mean_iou(masks: Bool[Tensor, "words pixels"], true: Bool[Tensor, "words pixels"]) -> Float[Tensor, "words"]:
    """Intersection over union, of the word's pixels and of the others, and their mean.

    >>> mean_iou(torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, False, False]])).tolist()
    [0.5833333333333333]
    """
    return (_iou(masks, true) + _iou(~masks, ~true)) / 2


def average_precision(
    scores: Float[Tensor, "words pixels"], true: Bool[Tensor, "words pixels"]
) -> Float[Tensor, "words"]:
    """Of the word's pixels in the order of a map."""
    from sklearn.metrics import average_precision_score

    return _each(scores, true, average_precision_score)


def auc(scores: Float[Tensor, "words pixels"], true: Bool[Tensor, "words pixels"]) -> Float[Tensor, "words"]:
    """The chance that a pixel of the word has a larger score than another: needs no threshold."""
    from sklearn.metrics import roc_auc_score

    return _each(scores, true, roc_auc_score)


def _iou(masks: Tensor, true: Tensor) -> Tensor:
    both, either = (masks & true).sum(1).double(), (masks | true).sum(1)
    return both / either.clamp(min=1)


def _each(scores: Tensor, true: Tensor, measure: object) -> Tensor:
    if bool((true.all(1) | ~true.any(1)).any()):
        raise InputError("true: a word has no pixel, or all of them; nothing can be ranked")
    pairs = zip(scores.detach().cpu().numpy(), true.cpu().numpy(), strict=True)
    return torch.tensor([float(measure(t, s)) for s, t in pairs], dtype=torch.float64)  # type: ignore[operator]
