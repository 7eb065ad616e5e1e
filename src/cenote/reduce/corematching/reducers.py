"""Tokens that score above the elbow of their scores, as a reducer."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.reduced import Reduced, selected
from cenote.core.requirements import require_at_least
from cenote.reduce.base import Reducer
from cenote.reduce.corematching.matching import above_elbow


class ElbowTokens(Reducer):
    """The tokens that score at least as much as the elbow of their set's scores: how many that are, the scores say.

    Args:
        strict: more than the elbow, as in the authors' code.
        minimum: at least so many are left, the largest.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[9.0, 1.0, 9.0, 0.0, 0.0, 1.0]])
        >>> ElbowTokens()(torch.rand(1, 6, 3), saliency=scores).assignment.tolist()
        [[0, 1, 2, -1, -1, 3]]

    Source:
        Wang et al. 2025, "CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for
        Comprehensive Acceleration of Vision-Language Models", arXiv 2505.19235.
    """

    needs = frozenset({"saliency"})
    keeps = "members"
    counts = "free"

    def __init__(self, *, strict: bool = False, minimum: int = 1) -> None:
        super().__init__()
        require_at_least(1, minimum=minimum)
        self.strict, self.minimum = strict, minimum

    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *,
        saliency: Float[Tensor, "batch tokens"],
    ) -> Reduced:
        return selected(x, above_elbow(saliency, mask, strict=self.strict, minimum=self.minimum), sizes)
