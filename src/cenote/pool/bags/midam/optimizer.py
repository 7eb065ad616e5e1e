from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cenote.core.errors import InputError
from cenote.pool.bags.midam.loss import MIDAMLoss


class MIDAM(Optimizer):
    """Descent with averaged momentum on the model and on `a` and `b` of the loss, then ascent on its `alpha`.

    `v <- m v + (1 - m) (grad + decay w)` (the first time `v = grad + decay w`), `w <- w - lr v`,
    `alpha <- max(0, alpha + lr ((c + b - a) - alpha))` with the new `a` and `b`.

    Args:
        params: parameters of the model, or groups of them.
        loss: the loss that it trains with; its `a` and `b` are added to the parameters.
        lr: learning rate.
        momentum: `m`.
        weight_decay: added to the gradients, of `a` and `b` too, as in the authors' code.

    Raises:
        InputError: where a number is out of range, or the parameters hold the loss's own.

    Example:
        >>> from cenote.pool.bags.midam.scorers import MIDAMSmoothedMax
        >>> from cenote.pool.bags.midam.loss import MIDAMSmoothedMaxLoss
        >>> model, loss = MIDAMSmoothedMax(torch.nn.Linear(3, 1)), MIDAMSmoothedMaxLoss(bags=4)
        >>> optimizer = MIDAM(model.parameters(), loss, lr=0.1)
        >>> loss(model.sampled(torch.randn(2, 4, 3)), torch.tensor([1, 0]), torch.tensor([0, 3])).backward()
        >>> optimizer.step()
        >>> round(float(loss.alpha), 1)
        0.1

    Source: Zhu et al., "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        loss: MIDAMLoss,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise InputError(
                f"lr, momentum, weight_decay: expected above 0, from 0 to below 1, and 0 or more; "
                f"got {lr}, {momentum}, {weight_decay}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p is own for group in self.param_groups for p in group["params"] for own in (loss.a, loss.b)):
            raise InputError("params: a and b of the loss are added by the optimiser itself; give the model's alone")
        self.add_param_group({"params": [loss.a, loss.b]})
        self.loss = loss

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One descent step of all parameters, one ascent step of `alpha`."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad.add(p, alpha=group["weight_decay"])
                state = self.state[p]
                if "average" not in state:
                    state["average"] = gradient.clone()
                else:
                    state["average"].lerp_(gradient, 1 - group["momentum"])
                p.sub_(state["average"], alpha=group["lr"])
        # a and b are the last group, and alpha goes at their rate
        self.loss.dual_step(self.param_groups[-1]["lr"])
        return value
