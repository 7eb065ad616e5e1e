from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of

Criterion = Callable[[Tensor, Tensor], Tensor]
Reduction = Literal["mean", "batchmean"]


def divergence_from_mean(
    logits: Float[Tensor, "batch branches classes"], reduction: Reduction = "mean"
) -> Float[Tensor, "branches"]:
    """`KL(softmax(mean_j o_j) || softmax(o_m))` of each branch, the mean held constant.

    Args:
        logits: of each branch.
        reduction: `"mean"` over samples and classes, as the authors; `"batchmean"` over samples, the divergence itself.
    """
    if logits.dim() != 3:
        raise InputError(f"logits: expected [batch, branches, classes], got {tuple(logits.shape)}")
    require_one_of(("mean", "batchmean"), reduction=reduction)
    together = logits.mean(1, keepdim=True).log_softmax(-1).detach().expand_as(logits)
    divergence = F.kl_div(logits.log_softmax(-1), together, reduction="none", log_target=True).sum(-1).mean(0)
    return divergence / logits.shape[-1] if reduction == "mean" else divergence


class DecorrelationLoss(nn.Module):
    """Every branch learns the answer, and is pushed away from what all of them say together.

    `L = sum_m CE(o_m, y) + weight * sum_m KL(softmax(mean_j o_j) || softmax(o_m))`, with a negative weight.

    Args:
        weight: the authors' lambda, -0.8. A strongly negative one can win over the first term, which then diverges: the
            divergence has no upper bound.
        criterion: `(logits [batch, classes], y) -> loss`; default cross-entropy.
        reduction: of the divergence; `"mean"` divides it by the number of classes too, as the authors do: with 10 classes
            instead of their 1000 the same weight pushes a hundred times harder.

    Example:
        >>> logits = torch.randn(4, 3, 10, requires_grad=True)
        >>> DecorrelationLoss()(logits, torch.tensor([0, 1, 2, 3])).backward()

    Source: Ryu, Han, Lim, "Gramian Attention Heads are Strong yet Efficient Vision Learners", ICCV 2023.
    """

    def __init__(self, weight: float = -0.8, criterion: Criterion | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.weight = weight
        self.criterion = F.cross_entropy if criterion is None else criterion
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Float[Tensor, "batch branches classes"],
        y: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    ) -> Float[Tensor, ""]:
        """The loss of a batch: `logits` from `GramianHeads.logits`, `y` as `criterion` wants it."""
        divergence = divergence_from_mean(logits, self.reduction)
        own = sum((self.criterion(o, y) for o in logits.unbind(1)), logits.new_zeros(()))
        return own + self.weight * divergence.sum()
