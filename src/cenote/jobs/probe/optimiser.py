"""AdamW whose learning rates fall to zero along a half cosine.

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


class CosineAdamW:
    """As `torch.optim.AdamW` and `CosineAnnealingLR`, one group of parameters for each learning rate.

    Args:
        groups: parameters.
        rates: the learning rate of each group at the start.
        weight_decay: decoupled.
        steps: after so many the learning rates are zero.
    """

    def __init__(
        self, groups: Sequence[Sequence[Tensor]], rates: Sequence[float], weight_decay: float, steps: int
    ) -> None:
        self._groups = [_Group(list(group), rate) for group, rate in zip(groups, rates, strict=True)]
        self._weight_decay = weight_decay
        self._steps = steps
        self._done = 0

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient, and take the gradients away."""
        share = (1 + math.cos(math.pi * self._done / self._steps)) / 2
        self._done += 1
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
