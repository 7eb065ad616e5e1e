from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cenote.core.requirements import require_one_of
from cenote.pool.attention.tree_cross_attention.retreever import ReTreever

Task = Literal["classification", "regression", "gaussian"]
Reward = Literal["acc", "nce"]


class TreeLosses(NamedTuple):
    """One step's losses.

    Attributes:
        total: what is minimised.
        tca, ca: prediction losses after the sampled search and after full attention.
        rl: the REINFORCE loss of the choices, entropy bonus included.
        reward, entropy, read: means over the queries; `read` counts the vectors that a query attended to.
    """

    total: Float[Tensor, ""]
    tca: Float[Tensor, ""]
    ca: Float[Tensor, ""]
    rl: Float[Tensor, ""]
    reward: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    read: Float[Tensor, ""]


class TreeMeasures(NamedTuple):
    """How well queries are answered, and at what price.

    Attributes:
        accuracy: of a classification, else `None`.
        log_likelihood: mean over queries, of a classification or of the `"gaussian"` task, else `None`.
        read: share of the real tokens that as many vectors as a query attended to would be.
        routing: by level, the share of the queries that opened the node of the token that they wanted; `None` where these
            were not given.
    """

    accuracy: float | None
    log_likelihood: float | None
    read: float
    routing: tuple[float, ...] | None


class TreeObjective:
    """The training objective of ReTreever: predict from what was found, and learn by reward which way to go.

    `L = L_TCA + ca_weight L_CA + rl_weight L_RL`, `L_RL = -mean(log pi(choices) (R - baseline)) - entropy_bonus H`, with the
    way drawn from the policy, `L_CA` the same loss after full attention with the same parameters, and `R` not
    differentiated.

    Args:
        task: `"classification"`: logits and class numbers; `"regression"`: squared error; `"gaussian"`: the prediction
            is `[mean; s]` with a standard deviation of `s`, see `deviation`, its negative log-likelihood the loss.
        reward: of a classification, `"acc"`: 1 where right, baseline 0; `"nce"`: minus the cross-entropy, baseline
            `-log C`. A regression's reward is minus its loss.
        ca_weight, rl_weight, entropy_bonus: weights; the defaults are the authors'.
        deviation: of the `"gaussian"` task, `"softplus"`: `0.05 + 0.95 softplus(s)`, or `"exp"`: `exp(s)`.

    Raises:
        InputError: where task or reward is unknown.

    Example:
        >>> model = ReTreever(4, 4, out_dim=10, dim=16, encoder_layers=1)
        >>> objective = TreeObjective("classification")
        >>> losses = objective(model, torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randint(10, (2, 5)))
        >>> losses.total.backward()

    Source: Feng et al., "Tree Cross Attention", ICLR 2024. There: Adam at 5e-4 with cosine decay, gradients clipped to norm 1.
    """

    def __init__(
        self,
        task: Task,
        reward: Reward = "acc",
        ca_weight: float = 1.0,
        rl_weight: float = 1.0,
        entropy_bonus: float = 0.01,
        deviation: Literal["softplus", "exp"] = "softplus",
    ) -> None:
        require_one_of(get_args(Task), task=task)
        require_one_of(get_args(Reward), reward=reward)
        require_one_of(("softplus", "exp"), deviation=deviation)
        self.task = task
        self.deviation = deviation
        self.reward = reward
        self.ca_weight = ca_weight
        self.rl_weight = rl_weight
        self.entropy_bonus = entropy_bonus

    def __call__(
        self,
        model: ReTreever,
        context: Float[Tensor, "batch tokens context_dim"],
        queries: Float[Tensor, "batch queries query_dim"],
        target: Shaped[Tensor, "batch queries *target"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> TreeLosses:
        """The losses of a batch, with ways drawn anew."""
        tree = model.encode(context, mask)
        embedded = model.embed_query(queries)
        found = model.tca.attend(embedded, tree, sample=True)
        prediction = model.predictor(found.output)
        each = self.losses(prediction, target)
        tca, ca = each.mean(), self.losses(model.predictor(model.tca.full(embedded, tree)), target).mean()
        reward, baseline = self.rewards(prediction, target, each)
        entropy = found.entropy.mean()
        rl = -(found.log_prob * (reward - baseline)).mean() - self.entropy_bonus * entropy
        total = tca + self.ca_weight * ca + self.rl_weight * rl
        read = found.read().to(total.dtype).mean()
        return TreeLosses(total, tca.detach(), ca.detach(), rl.detach(), reward.mean(), entropy.detach(), read)

    @torch.no_grad()
    def measure(
        self,
        model: ReTreever,
        context: Float[Tensor, "batch tokens context_dim"],
        queries: Float[Tensor, "batch queries query_dim"],
        target: Shaped[Tensor, "batch queries *target"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        wanted: Int[Tensor, "batch queries"] | None = None,
    ) -> TreeMeasures:
        """What always opening the best child comes to; `wanted` is the number of the token that answers each query."""
        tree = model.encode(context, mask)
        found = model.ask(queries, tree)
        prediction = model.predictor(found.output)
        likelihood = None if self.task == "regression" else -float(self.losses(prediction, target).mean())
        right = (prediction.argmax(-1) == target).double().mean() if self.task == "classification" else None
        routing = None if wanted is None else model.tca.routed(found, tree, wanted).double().mean((0, 1)).tolist()
        return TreeMeasures(
            None if right is None else float(right),
            likelihood,
            float((found.read() / tree.real[-1].sum(-1, keepdim=True).clamp(min=1)).mean()),
            None if routing is None else tuple(routing),
        )

    def losses(
        self, prediction: Float[Tensor, "batch queries out_dim"], target: Shaped[Tensor, "batch queries *target"]
    ) -> Float[Tensor, "batch queries"]:
        """The loss of each query."""
        if self.task == "classification":
            return F.cross_entropy(prediction.transpose(1, 2), target, reduction="none")
        if self.task == "regression":
            return (prediction - target).square().mean(-1)
        mean, s = prediction.chunk(2, -1)
        std = s.exp() if self.deviation == "exp" else 0.05 + 0.95 * F.softplus(s)
        z = (target - mean) / std
        return (0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def rewards(
        self,
        prediction: Float[Tensor, "batch queries out_dim"],
        target: Shaped[Tensor, "batch queries *target"],
        losses: Float[Tensor, "batch queries"],
    ) -> tuple[Float[Tensor, "batch queries"], float]:
        """`(R, baseline)`; no gradient passes."""
        if self.task != "classification":
            return -losses.detach(), 0.0
        if self.reward == "nce":
            return -losses.detach(), -math.log(prediction.shape[-1])
        return (prediction.argmax(-1) == target).to(losses.dtype), 0.0
