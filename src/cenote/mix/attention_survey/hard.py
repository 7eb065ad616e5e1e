"""Training of attention that takes one position: sampled, with the gradient of the likelihood ratio.

Source: Xu et al., "Show, Attend and Tell" (2015), arXiv 1502.03044; Williams (1992).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.requirements import require_rate
from cenote.mix.normalisers import one_hot, softmax


class Sampled(NamedTuple):
    """A position drawn for each row.

    Attributes:
        weights: one at the drawn position; zeros in rows that may read nothing.
        log_probability: of what was drawn, with its gradient; 0 in such rows.
    """

    weights: Float[Tensor, "*rows keys"]
    log_probability: Float[Tensor, "*rows"]


def sampled(
    scores: Float[Tensor, "*rows keys"],
    mask: Bool[Tensor, "*#rows keys"] | None = None,
    generator: torch.Generator | None = None,
) -> Sampled:
    """One position of each row, drawn from the softmax of its scores."""
    probability = softmax(scores, mask)
    noise = torch.empty_like(scores).exponential_(generator=generator)
    # the smallest of exponentials over their rates falls on i as often as its rate says
    drawn = one_hot((probability / noise).detach()) * (probability.sum(-1, keepdim=True) > 0)
    taken = (probability * drawn).sum(-1)
    return Sampled(drawn, taken.masked_fill(taken == 0, 1.0).log())


class Baseline:
    """A running mean of rewards: `b <- m b + (1 - m) mean(r)`; the first batch sets it."""

    def __init__(self, momentum: float = 0.9) -> None:
        require_rate(momentum=momentum)
        self.momentum, self.value = momentum, 0.0
        self._seen = False

    def __call__(self, reward: Float[Tensor, "*rows"]) -> float:
        """The baseline for these rewards: what was known before they came."""
        before = self.value if self._seen else float(reward.mean())
        self.value = self.momentum * before + (1 - self.momentum) * float(reward.mean())
        self._seen = True
        return before


def reinforce(
    log_probability: Float[Tensor, "*rows"], reward: Float[Tensor, "*rows"], baseline: float = 0.0
) -> Float[Tensor, ""]:
    """`-mean((r - b) log p)`: its gradient is in the mean that of `-E[r]`, whatever b is.

    Args:
        log_probability: of what was drawn, as of `sampled`.
        reward: what came of it, the negative loss say; no gradient flows through it.
        baseline: b, of the rewards before.
    """
    return -((reward.detach() - baseline) * log_probability).mean()
