"""Does an explanation hang on the model at all? The same model with other weights, and how alike two rankings are."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

STILL_ALIKE = 0.9
"""Rank correlation of two explanations, above which the model behind them seems not to matter."""


def redrawn(model: M, seed: int) -> M:
    """A copy whose matrices are drawn anew, each with its own deviation; biases and scales stay.

    The weakest form of the parameter randomisation test.

    Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            if p.dim() > 1 and p.numel() > 1:
                p.copy_(p.std() * torch.randn(p.shape, generator=generator))
    return other


def rank_correlation(a: Float[Tensor, "units"], b: Float[Tensor, "units"]) -> float:
    """Spearman's, ties by their mean rank; 0 where one side is all alike.

    >>> rank_correlation(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([1.0, 3.0, 2.0]))
    0.5
    """
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return round(float((x * y).sum()) / scale, 12) if scale > 0 else 0.0


def _ranks(values: Tensor) -> Float[Tensor, "units"]:
    _, place, count = values.detach().cpu().unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]
