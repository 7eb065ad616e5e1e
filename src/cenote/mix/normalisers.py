"""What makes weights of scores: softmax and its rivals, for every method that attends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.requirements import require_one_of, require_positive
from cenote.mix.base import Normaliser

Scores = Float[Tensor, "*rows keys"]
Readable = Bool[Tensor, "*#rows keys"]


class Softmax(Normaliser):
    """`softmax(s / T)`.

    Args:
        temperature: T; towards 0 it is the largest score alone, towards infinity the mean.
    """

    forgets_level = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        self.temperature = temperature

    def forward(self, scores: Scores, mask: Readable | None = None) -> Scores:
        return softmax(scores / self.temperature, mask)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"


class ScalableSoftmax(Normaliser):
    """`softmax(s log(n) scores)`, n the number of keys that a row may read: it does not flatten as rows grow longer.

    Args:
        factor: s at the start; learned.

    Source: Nakanishi (2025), arXiv 2501.19399.
    """

    forgets_level = True

    def __init__(self, factor: float = 0.43) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, scores: Scores, mask: Readable | None = None) -> Scores:
        read = readable(scores, mask)
        length = read.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
        # -inf times the logarithm of 1 is NaN
        return softmax(scores.masked_fill(~read, 0.0) * (self.factor * length.log()).to(scores.dtype), read)


class SelfAdjustedSoftmax(Normaliser):
    """`softmax` of scores times their place between the row's lowest (or 0) and highest (or 0): gradients vanish less.

        z = s (s - min(s_min, 0)) / (max(0, s_max) - min(s_min, 0))

    Source: Zheng et al. (2025), arXiv 2502.18277.
    """

    def forward(self, scores: Scores, mask: Readable | None = None) -> Scores:
        read = readable(scores, mask)
        least = scores.masked_fill(~read, math.inf).amin(-1, keepdim=True).clamp(max=0.0)
        most = scores.masked_fill(~read, -math.inf).amax(-1, keepdim=True).clamp(min=0.0)
        held = scores.masked_fill(~read, 0.0)
        spread = (most - least).masked_fill(most == least, 1.0)
        return softmax(held * (held - least) / spread, read)


class Sparsemax(Normaliser):
    """`argmin_p |p - s|^2` on the simplex: exact zeros.

    Source: Martins and Astudillo (2016), arXiv 1602.02068.
    """

    forgets_level = True

    def forward(self, scores: Scores, mask: Readable | None = None) -> Scores:
        return sparsemax(scores, mask)


class Entmax15(Normaliser):
    """`p_i = max(s_i / 2 - t, 0)^2`, t so that they sum to 1: between softmax and sparsemax.

    Source: Peters, Niculae and Martins (2019), arXiv 1905.05702.
    """

    forgets_level = True

    def forward(self, scores: Scores, mask: Readable | None = None) -> Scores:
        return entmax15(scores, mask)


class Sigmoid(Normaliser):
    """`1 / (1 + exp(-s))`, each key for itself.

    Args:
        normalised: weights are divided by their sum.
        bias: added to the scores.
    """

    def __init__(self, normalised: bool = False, bias: float = 0.0) -> None:
        super().__init__()
        self.normalised, self.bias = normalised, bias

    def forward(self, scores: Scores, mask: Readable | None = None) -> Scores:
        weights = (scores + self.bias).sigmoid().masked_fill(~readable(scores, mask), 0.0)
        if not self.normalised:
            return weights
        total = weights.sum(-1, keepdim=True)
        return weights / total.masked_fill(total == 0, 1.0)


class Hardmax(Normaliser):
    """One at the largest score, the lowest index of equal ones; gradients pass as those of softmax (straight through)."""

    forgets_level = True

    def forward(self, scores: Scores, mask: Readable | None = None) -> Scores:
        soft = softmax(scores, mask)
        # exact at both ends: soft - soft is 0, and adding it to 1 or 0 changes nothing
        return one_hot(hidden(scores, mask)) * (soft.sum(-1, keepdim=True) > 0) + (soft - soft.detach())


class GumbelSoftmax(Normaliser):
    """`softmax((s + g) / T)`, g of the Gumbel distribution: a sample of the categorical distribution as T goes to 0.

    Args:
        temperature: T; `anneal` lowers it.
        hard: one-hot forward, the gradient of the soft sample backward.

    Source: Jang, Gu and Poole (2017), arXiv 1611.01144; Maddison, Mnih and Teh (2017), arXiv 1611.00712.
    """

    forgets_level = True

    def __init__(self, temperature: float = 1.0, hard: bool = False) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        self.temperature, self.hard = temperature, hard

    def forward(self, scores: Scores, mask: Readable | None = None) -> Scores:
        if not self.training:
            return Hardmax()(scores, mask) if self.hard else softmax(scores / self.temperature, mask)
        noisy = scores - torch.empty_like(scores).exponential_().log()
        return (Hardmax() if self.hard else softmax)(noisy / self.temperature, mask)

    def anneal(self, step: int, rate: float = 3e-5, least: float = 0.5) -> float:
        """`T = max(least, exp(-rate step))`, set and given back."""
        self.temperature = max(least, math.exp(-rate * step))
        return self.temperature


NORMALISERS: Mapping[str, Callable[..., Normaliser]] = {
    "softmax": Softmax,
    "scalable softmax": ScalableSoftmax,
    "self-adjusted softmax": SelfAdjustedSoftmax,
    "sparsemax": Sparsemax,
    "entmax15": Entmax15,
    "sigmoid": Sigmoid,
    "normalised sigmoid": lambda **settings: Sigmoid(normalised=True, **settings),
    "hard": Hardmax,
    "gumbel": GumbelSoftmax,
}


def normaliser(name: str | Normaliser, **settings: Any) -> Normaliser:
    """What makes weights of scores, by its name.

    Raises:
        InputError: for a name that is not known, or settings that it does not have.

    >>> normaliser("softmax", temperature=2.0)
    Softmax(temperature=2)
    """
    if isinstance(name, Normaliser):
        return name
    require_one_of(NORMALISERS, normaliser=name)
    try:
        return NORMALISERS[name](**settings)
    except TypeError as error:
        raise InputError(f"normaliser: {name!r} does not take {', '.join(settings)}") from error


def readable(scores: Scores, mask: Readable | None) -> Bool[Tensor, "*rows keys"]:
    """Which keys have weights: those that the mask leaves and whose score is not -inf."""
    seen = scores != -math.inf
    return seen if mask is None else seen & mask


def hidden(scores: Scores, mask: Readable | None) -> Scores:
    """The scores, -inf where the mask is False."""
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def softmax(scores: Scores, mask: Readable | None = None) -> Scores:
    """Zeros where the mask is False, and in rows that may read nothing.

    >>> softmax(torch.tensor([[1.0, 1.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([[True, True, False], [False] * 3]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    scores = hidden(scores, mask)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def sparsemax(scores: Scores, mask: Readable | None = None) -> Scores:
    """The nearest point of the simplex; zeros as `softmax`.

    >>> sparsemax(torch.tensor([0.6, 0.2, -3.0]))
    tensor([0.7000, 0.3000, 0.0000])
    """
    z, seen = _below_the_largest(scores, mask)
    with torch.no_grad():
        ordered = z.sort(-1, descending=True).values
        ranks = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        inside = 1 + ranks * ordered > ordered.cumsum(-1)
        count = inside.sum(-1, keepdim=True)
        least = ordered.gather(-1, (count - 1).clamp(min=0))
    support = (z >= least) & seen
    threshold = (z.masked_fill(~support, 0.0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True).clamp(min=1)
    return (z - threshold).clamp(min=0.0).masked_fill(~support, 0.0).to(scores.dtype)


def entmax15(scores: Scores, mask: Readable | None = None) -> Scores:
    """`max(s / 2 - t, 0)^2` that sum to 1; zeros as `softmax`.

    >>> entmax15(torch.tensor([1.0, 1.0, -5.0]))
    tensor([0.5000, 0.5000, 0.0000])
    """
    z, seen = _below_the_largest(scores / 2, mask)
    with torch.no_grad():
        ordered = z.sort(-1, descending=True).values
        threshold = _root_threshold(*_running_moments(ordered))
        count = (threshold <= ordered).sum(-1, keepdim=True)
        least = ordered.gather(-1, (count - 1).clamp(min=0))
    support = (z >= least) & seen
    held = z.masked_fill(~support, 0.0)
    number = support.sum(-1, keepdim=True).clamp(min=1).to(z.dtype)
    mean = held.sum(-1, keepdim=True) / number
    spread = (z - mean).masked_fill(~support, 0.0).square().sum(-1, keepdim=True)
    threshold = mean - ((1 - spread) / number).clamp(min=torch.finfo(z.dtype).tiny).sqrt()
    return (z - threshold).masked_fill(~support, 0.0).square().to(scores.dtype)


def one_hot(scores: Scores) -> Scores:
    """One at the largest score, the lowest index of equal ones."""
    # argmax does not say which of equal ones it takes
    first = (scores == scores.amax(-1, keepdim=True)).cumsum(-1).eq(0).sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, first.clamp(max=scores.shape[-1] - 1), 1.0)


def _below_the_largest(scores: Scores, mask: Readable | None) -> tuple[Scores, Bool[Tensor, "*rows keys"]]:
    """Scores less the row's largest, in float32 at least; what lies 1 or more below it has no weight, so none is below -2."""
    seen = readable(scores, mask)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~seen, -math.inf)
    largest = wide.amax(-1, keepdim=True)
    return (wide - largest.masked_fill(largest == -math.inf, 0.0)).clamp(min=-2.0), seen


def _running_moments(ordered: Scores) -> tuple[Tensor, Tensor, Tensor]:
    ranks = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device, dtype=ordered.dtype)
    mean = ordered.cumsum(-1) / ranks
    return mean, ranks * (ordered.square().cumsum(-1) / ranks - mean.square()), ranks


def _root_threshold(mean: Tensor, spread: Tensor, number: Tensor) -> Tensor:
    return mean - ((1 - spread) / number).clamp(min=0.0).sqrt()
