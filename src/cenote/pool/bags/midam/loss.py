"""MIDAM's losses: the AUC objective over pooled scores, its gradient estimated from a few instances per bag.

Source: Zhu, Li, Zhang, Yang, Yang, "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of, require_positive
from cenote.pool.bags.midam.scorers import AttentionStatistic, BagScorer, MIDAMAttention, MIDAMSmoothedMax

Init = Literal["first_value", "authors"]


class MIDAMLoss(nn.Module, ABC):
    """What both modes share: `E+(h - a)^2 + E-(h - b)^2 + 2 alpha (c + E- h - E+ h) - alpha^2`, maximised over `alpha >= 0`.

    `a` and `b` are learned with the model, `alpha` by `MIDAM`'s dual step. Everything that a resumed run needs is in the
    `state_dict`: `a`, `b`, `alpha` and the running estimate of each bag.

    Args:
        bags, margin, gamma, init, exact_alpha: as of `MIDAMSmoothedMaxLoss`.

    Raises:
        InputError: where a number is out of range, or a batch repeats a bag or holds one class only.
    """

    scorer: type[BagScorer]
    """The scorer of this mode."""
    a: nn.Parameter
    b: nn.Parameter
    alpha: Tensor
    seen: Bool[Tensor, "bags"]

    def __init__(
        self,
        bags: int,
        margin: float = 1.0,
        gamma: float = 0.9,
        init: Init = "first_value",
        exact_alpha: bool = False,
    ) -> None:
        super().__init__()
        if bags < 2:
            raise InputError(f"bags: expected at least one bag of each class, got {bags}")
        if not 0 < gamma <= 1:
            raise InputError(f"gamma: expected a share above 0 to 1, got {gamma}")
        require_one_of(("first_value", "authors"), init=init)
        self.bags = bags
        self.margin = margin
        self.gamma = gamma
        self.init: Init = init
        self.exact_alpha = exact_alpha
        self.a = nn.Parameter(torch.zeros(()))
        self.b = nn.Parameter(torch.zeros(()))
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("seen", torch.full((bags,), init == "authors"))
        for name, estimates in self.unseen(bags).items():
            self.register_buffer(name, estimates)

    @abstractmethod
    def unseen(self, bags: int) -> dict[str, Float[Tensor, "bags"]]:
        """What is remembered of each bag, by name, as the authors start it."""

    @abstractmethod
    def visited(
        self, sampled: Any, index: Int[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Update the estimates of these bags; `(h, slope)` as `surrogate` takes them."""

    def require_scorer(self, model: BagScorer) -> None:
        """Raise `InputError` where `model` is the scorer of another mode, or pools otherwise than this loss takes it to."""
        if isinstance(model, MIDAMSmoothedMax | MIDAMAttention) and not isinstance(model, self.scorer):
            raise InputError(
                f"model: {type(self).__name__} takes what {self.scorer.__name__} says of samples, got a "
                f"{type(model).__name__}; give scorer and loss of one mode"
            )

    def forward(self, sampled: Any, y: Tensor, index: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """The surrogate of a batch, after updating its bags' estimates.

        Args:
            sampled: what `sampled` of the scorer of this mode says of them.
            y: labels 0 and 1 of the bags.
            index: which bags they are; each once.
        """
        positive = self._checked(y, index)
        h, slope = self.visited(sampled, index)
        self.seen[index] = True
        return self.surrogate(h, slope, positive)

    @torch.no_grad()
    def dual_step(self, lr: float) -> None:
        """`alpha <- max(0, alpha + lr ((c + b - a) - alpha))`, with `a` and `b` as they are now."""
        self.alpha.add_(lr * ((self.margin + self.b - self.a) - self.alpha)).clamp_(min=0)

    def surrogate(
        self,
        h: Float[Tensor, "batch"],
        slope: Float[Tensor, "batch"],
        positive: Bool[Tensor, "batch"],
    ) -> Float[Tensor, ""]:
        """A number whose gradient is the estimator.

        Args:
            h: pooled scores from the estimates, constants.
            slope: their gradient's carrier: `dh/dw = d slope / dw`; its value does not matter to the gradient.
            positive: which bags are of the positive class.
        """
        plus, minus = positive, ~positive
        a, b = self.a.detach(), self.b.detach()
        scores = (2 * (h - a) * slope)[plus].mean() + (2 * (h - b) * slope)[minus].mean()
        apart = slope[minus].mean() - slope[plus].mean()
        centres = (h[plus] - self.a).square().mean() + (h[minus] - self.b).square().mean()
        return scores + (2 if self.exact_alpha else 1) * self.alpha * apart + centres

    def _checked(self, y: Tensor, index: Int[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
        if index.dim() != 1 or index.dtype != torch.int64:
            raise InputError(f"index: expected [batch] int64 bag numbers, got {index.dtype} {tuple(index.shape)}")
        if bool((index < 0).any()) or bool((index >= self.bags).any()):
            raise InputError(f"index: expected bag numbers from 0 to {self.bags - 1}, got {index.tolist()[:10]}")
        if len(index.unique()) < len(index):
            raise InputError("index: a batch holds a bag twice; each has one estimate to update, give it once")
        y = y.flatten()
        if y.shape != index.shape:
            raise InputError(f"y: expected one label for each of {len(index)} bags, got {len(y)}")
        if bool(((y != 0) & (y != 1)).any()):
            raise InputError(f"y: expected labels 0 and 1, got {y.unique().tolist()[:10]}")
        positive = y == 1
        if not bool(positive.any()) or bool(positive.all()):
            raise InputError(
                "y: the batch holds one class only; draw bags of both classes (cenote.pool.TwoClassBatches)"
            )
        return positive


class MIDAMSmoothedMaxLoss(MIDAMLoss):
    """Smoothed-max mode. With `f_i = mean exp(phi / tau)` over the sampled instances of bag `i`:

    `s_i <- (1 - gamma) s_i + gamma f_i`, `h_i = tau log s_i`, and `dh_i ~ tau f_i / s_i`.

    Args:
        bags: number of training bags.
        tau: temperature of the scorer.
        margin: `c`, by how much the mean scores of the classes are to differ; 0.1 to 1.
        gamma: how much of a bag's estimate is replaced at a visit; 1 keeps no memory. 0.1 to 0.9.
        init: what a bag's estimate is before its first visit: `"first_value"`: what that visit brings; `"authors"`: 0. With 0
            the first gradient of a bag is `1 / gamma` times too large.
        exact_alpha: whether the last term has the factor 2 of the objective; the authors' estimator has 1.

    Example:
        >>> loss = MIDAMSmoothedMaxLoss(bags=10, tau=0.5)
        >>> loss(torch.randn(4), torch.tensor([1, 0, 1, 0]), torch.tensor([3, 1, 9, 0])).shape
        torch.Size([])

    Source: Zhu et al., "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.

    Note:
        `log s` is kept instead of `s`, and `log f` is taken: `exp(phi / tau)` overflows float32 at 88. The estimate is updated
        before the loss reads it.
    """

    scorer = MIDAMSmoothedMax
    log_s: Float[Tensor, "bags"]

    def __init__(
        self,
        bags: int,
        tau: float = 0.1,
        margin: float = 1.0,
        gamma: float = 0.9,
        init: Init = "first_value",
        exact_alpha: bool = False,
    ) -> None:
        super().__init__(bags, margin, gamma, init, exact_alpha)
        require_positive(tau=tau)
        self.tau = tau

    def require_scorer(self, model: BagScorer) -> None:
        super().require_scorer(model)
        tau = getattr(model, "tau", self.tau)
        if tau != self.tau:
            raise InputError(
                f"tau: the scorer pools at {tau:g}, the loss at {self.tau:g}; give both the same temperature"
            )

    def unseen(self, bags: int) -> dict[str, Float[Tensor, "bags"]]:
        return {"log_s": torch.full((bags,), float("-inf"))}

    def visited(
        self, sampled: Float[Tensor, "batch"], index: Int[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        with torch.no_grad():
            log_s = mixed(self.log_s[index], sampled, self.gamma)
            log_s = torch.where(self.seen[index], log_s, sampled)
            self.log_s[index] = log_s
        return self.tau * log_s, self.tau * (sampled - log_s).exp()


class MIDAMAttentionLoss(MIDAMLoss):
    """Attention mode. With `n_i = mean exp(g) d` and `m_i = mean exp(g)` over the sampled instances of bag `i`:

    `s_n <- (1 - gamma) s_n + gamma n_i`, `s_d` likewise with `m_i`, `h_i = sigmoid(s_n / s_d)`, and
    `dh_i ~ h_i (1 - h_i) (n_i / s_d - s_n m_i / s_d^2)`.

    Args:
        bags, margin, gamma, exact_alpha: as of `MIDAMSmoothedMaxLoss`.
        init: what a bag's estimate is before its first visit: `"first_value"`: what that visit brings; `"authors"`: 1.

    Example:
        >>> from cenote.pool.bags.midam.scorers import AttentionStatistic
        >>> loss = MIDAMAttentionLoss(bags=10)
        >>> sampled = AttentionStatistic(torch.randn(4), torch.randn(4))
        >>> loss(sampled, torch.tensor([1, 0, 1, 0]), torch.tensor([3, 1, 9, 0])).shape
        torch.Size([])

    Source: Zhu et al., "Provable Multi-instance Deep AUC Maximization with Stochastic Pooling", ICML 2023.

    Note:
        `s_n / s_d` and `log s_d` are kept instead of `s_n` and `s_d`: `exp(g)` overflows float32 at 88. The authors bound `s_d`
        below by 1e-8, which a logarithm does not need.
    """

    scorer = MIDAMAttention
    score: Float[Tensor, "bags"]
    log_mass: Float[Tensor, "bags"]

    def unseen(self, bags: int) -> dict[str, Float[Tensor, "bags"]]:
        return {"score": torch.ones(bags), "log_mass": torch.zeros(bags)}

    def visited(
        self, sampled: AttentionStatistic, index: Int[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        with torch.no_grad():
            before, seen = self.log_mass[index], self.seen[index]
            log_mass = torch.where(seen, mixed(before, sampled.log_mass, self.gamma), sampled.log_mass)
            kept = (1 - self.gamma) * (before - log_mass).exp()
            new = self.gamma * (sampled.log_mass - log_mass).exp()
            score = torch.where(seen, kept * self.score[index] + new * sampled.score, sampled.score)
            self.log_mass[index], self.score[index] = log_mass, score
        h = torch.sigmoid(score)
        share = (sampled.log_mass - log_mass).exp()
        return h, h * (1 - h) * share * (sampled.score - score)


def mixed(log_old: Float[Tensor, "batch"], log_new: Float[Tensor, "batch"], gamma: float) -> Float[Tensor, "batch"]:
    """`log((1 - gamma) old + gamma new)` from the logarithms."""
    gamma_ = torch.tensor(gamma, dtype=log_new.dtype, device=log_new.device)
    return torch.logaddexp(log_old + torch.log1p(-gamma_), log_new + gamma_.log())
