from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cenote.core.errors import InputError


class LARS(Optimizer):
    """Gradient descent with momentum in which every weight moves by a like share of its own length.

    `g <- g + decay w`, `r = trust |w| / |g|` (1 where either length is 0), `v <- momentum v + r g`, `w <- w - lr v`. Vectors
    and numbers (biases, norms) take `r = 1` and no decay.

    Args:
        parameters: as for any optimiser.
        lr: learning rate.
        momentum, weight_decay, trust: of the equation.

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimiser = LARS(layer.parameters(), lr=1.0)
        >>> layer(torch.ones(4, 3)).square().mean().backward()
        >>> optimiser.step()

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        trust: float = 1e-3,
    ) -> None:
        if lr < 0:
            raise InputError(f"lr: expected a learning rate of at least 0, got {lr}")
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if there is one, computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.dim() > 1:
                    g = g + group["weight_decay"] * p
                    length, slope = p.norm(), g.norm()
                    ratio = torch.where((length > 0) & (slope > 0), group["trust"] * length / slope, 1.0)
                    g = ratio * g
                v = self.state[p].setdefault("velocity", torch.zeros_like(p))
                v.mul_(group["momentum"]).add_(g)
                p.sub_(v, alpha=group["lr"])
        return loss
