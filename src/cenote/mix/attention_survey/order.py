"""Rows with padding in any place, for what reads from the first token to the last."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor


def real_first(mask: Bool[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
    """Where the tokens stand if the real ones are moved to the front, in their order.

    >>> import torch
    >>> real_first(torch.tensor([[False, True, False, True]]))
    tensor([[1, 3, 0, 2]])
    """
    return (~mask).byte().argsort(dim=1, stable=True)
