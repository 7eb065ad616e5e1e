"""AdamW and LARS whose learning rates fall to zero along a half cosine.

torch's `Optimizer` class loads torch's compiler when a process makes its first one, which takes longer than many a probe; its
functional form does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTUM, TRUST = 0.9, 1e-3


@dataclass
class _Group:
    parameters: list[Tensor]
    rate: float
    means: list[Tensor] = field(init=False)
    squares: list[Tensor] = field(init=False)
    steps: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.zeros(()) for _ in self.parameters]


class _Cosine:
    """What a learning rate along a half cosine needs to know."""

    def __init__(self, weight_decay: float, steps: int, warmup: int) -> None:
        self._weight_decay = weight_decay
        self._steps = steps
        self._warmup = warmup
        self._done = 0

    def _next_share(self) -> float:
        """The learning rate of this step, as a share of its largest."""
        self._done += 1
        return share_of_rate(self._done - 1, self._steps, self._warmup)


class CosineAdamW(_Cosine):
    """As `torch.optim.AdamW` and `CosineAnnealingLR`, one group of parameters for each learning rate.

    Args:
        groups: parameters.
        rates: the learning rate of each group at the start.
        weight_decay: decoupled.
        steps: after so many the learning rates are zero.
        warmup: during so many of them they rise from zero in a straight line.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        rates: Sequence[float],
        weight_decay: float,
        steps: int,
        warmup: int = 0,
    ) -> None:
        super().__init__(weight_decay, steps, warmup)
        self._groups = [_Group(list(group), rate) for group, rate in zip(groups, rates, strict=True)]

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient, and take the gradients away."""
        share = self._next_share()
        for group in self._groups:
            moved = [i for i, p in enumerate(group.parameters) if p.grad is not None]
            parameters = [group.parameters[i] for i in moved]
            adamw(
                parameters,
                [p.grad for p in parameters if p.grad is not None],
                [group.means[i] for i in moved],
                [group.squares[i] for i in moved],
                [],
                [group.steps[i] for i in moved],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=group.rate * share,
                weight_decay=self._weight_decay,
                eps=1e-8,
                maximize=False,
            )
            for p in parameters:
                p.grad = None


class CosineLARS(_Cosine):
    """Gradient descent with momentum in which every weight of every member moves by a like share of its own length.

    `g <- g + decay w`, `r = 0.001 |w| / |g|` (1 where either length is 0), `v <- 0.9 v + r g`, `w <- w - lr v`. Vectors and
    numbers take `r = 1` and no decay.

    Args:
        groups: parameters, members along the first dimension; lengths are those of each member's own.
        rates, weight_decay, steps, warmup: as of `CosineAdamW`; the decay is part of the gradient.

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        rates: Sequence[float],
        weight_decay: float,
        steps: int,
        warmup: int = 0,
    ) -> None:
        super().__init__(weight_decay, steps, warmup)
        self._groups = [(list(group), rate) for group, rate in zip(groups, rates, strict=True)]
        self._velocities = [[torch.zeros_like(p) for p in group] for group, _ in self._groups]

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient, and take the gradients away."""
        share = self._next_share()
        for (group, rate), velocities in zip(self._groups, self._velocities, strict=True):
            for p, v in zip(group, velocities, strict=True):
                if p.grad is None:
                    continue
                g = p.grad
                if p.dim() > 2:
                    g = g + self._weight_decay * p
                    own = tuple(range(1, p.dim()))
                    length, slope = (torch.linalg.vector_norm(x, dim=own, keepdim=True) for x in (p, g))
                    g = g * torch.where((length > 0) & (slope > 0), TRUST * length / slope, 1.0)
                v.mul_(MOMENTUM).add_(g)
                p.sub_(v, alpha=rate * share)
                p.grad = None


def share_of_rate(done: int, steps: int, warmup: int = 0) -> float:
    """The learning rate after so many steps, as a share of its largest.

    >>> [round(share_of_rate(n, steps=6, warmup=2), 3) for n in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if done < warmup:
        return done / warmup
    return (1 + math.cos(math.pi * (done - warmup) / (steps - warmup))) / 2
