"""Two ways of doing the same thing give the same numbers: asked before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def require_same(ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor]) -> None:
    """Stop unless both are equal to rounding, relative to the largest number of each tensor.

    Raises:
        AssertionError: naming the largest difference.
    """
    ours = [ours] if isinstance(ours, Tensor) else ours
    theirs = [theirs] if isinstance(theirs, Tensor) else theirs
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"result {i}: {a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}")
        a, b = a.detach(), b.detach()
        difference = float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))
        if not difference <= TOLERANCE[a.dtype]:
            raise AssertionError(f"result {i} differs by {difference:.1e} of its largest number")
