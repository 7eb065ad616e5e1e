"""Probability mass on the listed answers, what the rest can change, and rules by which an answer is chosen.

Source: Wiegreffe et al., "Attentiveness to Answer Choices Doesn't Always Entail High QA Accuracy" (2023), arXiv 2305.14596.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_one_of

Rule = Literal["raw", "prior", "per token"]
LEAST = math.log(1e-15)
"""What a probability of zero is taken for where it is divided by."""


class Mass(NamedTuple):
    """Of each question.

    Attributes:
        mass: probability of all listed choices together (PMV, attentiveness).
        margin: of the best choice over the second; of a single choice its probability.
        unaffectable: whether no share of the remaining mass, given to any choices, can change the best one.
        leftover: how much of the remaining mass is above the margin.
    """

    mass: Float[Tensor, "items"]
    margin: Float[Tensor, "items"]
    unaffectable: Bool[Tensor, "items"]
    leftover: Float[Tensor, "items"]

    @property
    def percent_unaffectable(self) -> float:
        return 100 * float(self.unaffectable.double().mean())


def mass_on_choices(
    log_probabilities: Float[Tensor, "items choices"], mask: Bool[Tensor, "items choices"] | None = None
) -> Mass:
    """Attentiveness, and the bound on surface form competition: at most `1 - mass` can be moved.

    A question is unaffectable where `1 - mass < p1 - p2`, strictly.

    Args:
        log_probabilities: of whole choices given the prompt, not divided by their lengths.
        mask: True = a real choice, where questions have different numbers of them.

    Raises:
        InputError: for log-probabilities above 0 or NaN, or a question without a choice.

    Example:
        >>> found = mass_on_choices(torch.tensor([[0.6, 0.3], [0.3, 0.2]]).log())
        >>> found.unaffectable.tolist(), [round(x, 3) for x in found.mass.tolist()]
        ([True, False], [0.9, 0.5])
    """
    hidden = _hidden(log_probabilities, mask)
    logs = log_probabilities.masked_fill(hidden, -torch.inf)
    if bool(logs.isnan().any()) or bool((logs > 1e-6).any()):
        raise InputError("log_probabilities: expected at most 0, and no NaN; take the logarithm of probabilities")
    mass = logs.logsumexp(1).exp()
    best = logs.topk(min(2, logs.shape[1]), 1).values.exp()
    margin = best[:, 0] - best[:, 1] if best.shape[1] == 2 else best[:, 0]
    remaining = 1 - mass
    return Mass(mass, margin, remaining < margin, (remaining - margin).clamp(min=0))


def chosen(
    log_probabilities: Float[Tensor, "items choices"],
    rule: Rule = "raw",
    *,
    prior: Float[Tensor, "items choices"] | None = None,
    tokens: Int[Tensor, "items choices"] | None = None,
    mask: Bool[Tensor, "items choices"] | None = None,
) -> Int[Tensor, "items"]:
    """The choice that a rule takes; the first of equals.

    Args:
        log_probabilities: of whole choices given the prompt.
        rule: `"raw"` the probability; `"prior"` divided by that without the question, zero taken for 1e-15; `"per token"` the
            mean log-probability of a token.
        prior: log-probabilities of the choices without the question, for `"prior"`.
        tokens: how many each choice has, for `"per token"`.
        mask: True = a real choice.

    Example:
        >>> logs = torch.tensor([[0.4, 0.1]]).log()
        >>> chosen(logs).tolist(), chosen(logs, "prior", prior=torch.tensor([[0.8, 0.1]]).log()).tolist()
        ([0], [1])
    """
    require_one_of(get_args(Rule), rule=rule)
    hidden = _hidden(log_probabilities, mask)
    scores = log_probabilities
    if rule == "prior":
        if prior is None or prior.shape != scores.shape:
            raise InputError("prior: give the log-probabilities of the same choices without the question")
        scores = scores.clamp(min=LEAST) - prior.clamp(min=LEAST)
    elif rule == "per token":
        if tokens is None or tokens.shape != scores.shape:
            raise InputError("tokens: give how many each choice has")
        scores = scores / tokens.clamp(min=1)
    scores = scores.masked_fill(hidden, -torch.inf)
    # torch does not say which of equals argmax takes
    return (scores == scores.amax(1, keepdim=True)).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, 0]


def _hidden(logs: Tensor, mask: Tensor | None) -> Bool[Tensor, "items choices"]:
    if logs.dim() != 2 or 0 in logs.shape:
        raise InputError(f"log_probabilities: expected [items, choices], got {list(logs.shape)}")
    if mask is None:
        return torch.zeros_like(logs, dtype=torch.bool)
    if mask.shape != logs.shape or mask.dtype != torch.bool:
        raise InputError(f"mask: expected bool {list(logs.shape)}, got {mask.dtype} {list(mask.shape)}")
    if not bool(mask.any(1).all()):
        raise InputError("mask: a question has no choice")
    return ~mask
