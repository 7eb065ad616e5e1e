"""How well a key fits a query: twelve alignment functions by name.

Formulas are those in common use under the survey's names (inferred); weights start Xavier-uniform, biases at 0.

Source: Chaudhari, Mithal, Polatkan and Ramanath, "An Attentive Survey of Attention Models" (2021), arXiv 1904.02874.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.base import ScoreModifier

Activation = Callable[[Tensor], Tensor]
Scored = Float[Tensor, "batch heads queries keys"]
Name = Literal[
    "similarity",
    "dot",
    "scaled dot",
    "general",
    "biased general",
    "activated general",
    "kernel",
    "concat",
    "additive",
    "deep",
    "location-based",
    "feature-based",
]


class Alignment(ScoreModifier):
    """Base of the alignment functions `a(k, q)`; queries and keys may differ in width where the formula lets them.

    Args:
        query_width, key_width: of a head.
    """

    def __init__(self, query_width: int, key_width: int) -> None:
        super().__init__()
        require_at_least(1, query_width=query_width, key_width=key_width)
        self.query_width, self.key_width = query_width, key_width

    def forward(
        self,
        q: Float[Tensor, "batch heads queries query_width"],
        k: Float[Tensor, "batch heads keys key_width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch keys"]] | None = None,  # noqa: ARG002
    ) -> Scored:
        """Scores, see `ScoreModifier`; positions play no part but in `LocationAlignment`.

        Raises:
            InputError: for heads of another width.
        """
        for name, given, width in (("q", q, self.query_width), ("k", k, self.key_width)):
            if given.shape[-1] != width:
                raise InputError(f"{name}: expected heads of width {width}, got {given.shape[-1]}")
        scores = self.align(q, k)
        return scores if mask is None else scores.masked_fill(~mask, -math.inf)

    @abstractmethod
    def align(self, q: Tensor, k: Tensor) -> Scored:
        """`a`, of every query and key."""


class SameWidth(Alignment):
    """Base of those that multiply queries and keys channel by channel."""

    def __init__(self, query_width: int, key_width: int) -> None:
        super().__init__(query_width, key_width)
        if query_width != key_width:
            raise InputError(
                f"key_width: {type(self).__name__} multiplies queries and keys of one width, got {query_width} and {key_width}"
            )


class SimilarityAlignment(SameWidth):
    """`q . k / (|q| |k|)`."""

    def align(self, q: Tensor, k: Tensor) -> Scored:
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT


class DotAlignment(SameWidth):
    """`q . k`."""

    def align(self, q: Tensor, k: Tensor) -> Scored:
        return q @ k.mT


class ScaledDotAlignment(SameWidth):
    """`q . k / sqrt(d)`."""

    def align(self, q: Tensor, k: Tensor) -> Scored:
        return q @ k.mT / math.sqrt(self.key_width)


class GeneralAlignment(Alignment):
    """`q W k`; `k . (W q + b)` with `biased`; `act(q W k + b)` with an activation, b then a number."""

    def __init__(
        self, query_width: int, key_width: int, biased: bool = False, activation: Activation | None = None
    ) -> None:
        super().__init__(query_width, key_width)
        self.weight = _xavier(query_width, key_width)
        self.activation = activation
        self.bias: nn.Parameter | None = None
        if activation is not None:
            self.bias = nn.Parameter(torch.zeros(()))
        elif biased:
            self.bias = nn.Parameter(torch.zeros(key_width))

    def align(self, q: Tensor, k: Tensor) -> Scored:
        mapped = q @ self.weight
        if self.activation is not None:
            assert self.bias is not None
            return self.activation(mapped @ k.mT + self.bias)
        return (mapped if self.bias is None else mapped + self.bias) @ k.mT


class KernelAlignment(SameWidth):
    """`log(phi(q) . phi(k))`, so that softmax divides by the sum; `attend` does it in time that is linear in the tokens.

    Args:
        query_width, key_width: of a head.
        feature: phi, positive; `elu + 1` by default.
    """

    def __init__(self, query_width: int, key_width: int, feature: Activation | None = None) -> None:
        super().__init__(query_width, key_width)
        self.feature = feature or _above_zero

    def align(self, q: Tensor, k: Tensor) -> Scored:
        return (self.feature(q) @ self.feature(k).mT).log()

    def attend(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch heads keys width"],
        v: Float[Tensor, "batch heads keys value_width"],
        mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """What softmax of these scores gives, without a `[queries, keys]` tensor; zeros where an item has no key."""
        real = None if mask is None else mask.unsqueeze(1)
        k, v = cleared(k, real), cleared(v, real)
        of_queries, of_keys = self.feature(q), self.feature(k)
        if mask is not None:
            of_keys = of_keys * mask[:, None, :, None]
        total = of_queries @ of_keys.sum(-2).unsqueeze(-1)
        return of_queries @ (of_keys.mT @ v) / total.masked_fill(total == 0, 1.0)


class AdditiveAlignment(Alignment):
    """`w . act(W_1 q + W_2 k + b)`.

    Args:
        query_width, key_width: of a head.
        hidden: width in between.
        activation: tanh by default.
    """

    def __init__(self, query_width: int, key_width: int, hidden: int = 32, activation: Activation = torch.tanh) -> None:
        super().__init__(query_width, key_width)
        require_at_least(1, hidden=hidden)
        self.of_query, self.of_key = _xavier(hidden, query_width), _xavier(hidden, key_width)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out = _xavier(1, hidden)
        self.activation = activation

    def align(self, q: Tensor, k: Tensor) -> Scored:
        mapped = (q @ self.of_query.mT).unsqueeze(-2) + (k @ self.of_key.mT).unsqueeze(-3)
        return (self.activation(mapped + self.bias) @ self.out.mT).squeeze(-1)


class ConcatAlignment(Alignment):
    """`w . act(W [q; k] + b)`; the same as `AdditiveAlignment` with `W = [W_1 | W_2]`, and computed so."""

    def __init__(self, query_width: int, key_width: int, hidden: int = 32, activation: Activation = torch.tanh) -> None:
        super().__init__(query_width, key_width)
        require_at_least(1, hidden=hidden)
        self.weight = _xavier(hidden, query_width + key_width)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out = _xavier(1, hidden)
        self.activation = activation

    def align(self, q: Tensor, k: Tensor) -> Scored:
        of_query, of_key = self.weight.split([self.query_width, self.key_width], 1)
        mapped = (q @ of_query.mT).unsqueeze(-2) + (k @ of_key.mT).unsqueeze(-3)
        return (self.activation(mapped + self.bias) @ self.out.mT).squeeze(-1)


class DeepAlignment(Alignment):
    """`w . E_(L-1) + b_L`, `E_l = act(W_l E_(l-1) + b_l)`, `E_1 = act(W_1 k + W_0 q + b_1)`.

    Args:
        query_width, key_width: of a head.
        hidden: width of the layers.
        layers: L, from 2.
        activation: tanh by default.
    """

    level_parameters = ("bias",)

    def __init__(
        self,
        query_width: int,
        key_width: int,
        hidden: int = 32,
        layers: int = 3,
        activation: Activation = torch.tanh,
    ) -> None:
        super().__init__(query_width, key_width)
        require_at_least(2, layers=layers)
        self.first = AdditiveAlignment(query_width, key_width, hidden, activation)
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 2))
        for layer in self.inner:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.bias = nn.Parameter(torch.zeros(()))

    def align(self, q: Tensor, k: Tensor) -> Scored:
        first = self.first
        held = first.activation(
            (q @ first.of_query.mT).unsqueeze(-2) + (k @ first.of_key.mT).unsqueeze(-3) + first.bias
        )
        for layer in self.inner:
            held = first.activation(layer(held))
        return (held @ first.out.mT).squeeze(-1) + self.bias


class LocationAlignment(Alignment):
    """`(W q)_i` of the key at place i: by the query and the place alone.

    Args:
        query_width, key_width: of a head; what the keys are plays no part.
        most: so many places; keys stand at their positions, where these are given.
    """

    reads_keys = False

    def __init__(self, query_width: int, key_width: int, most: int = 64) -> None:
        super().__init__(query_width, key_width)
        require_at_least(1, most=most)
        self.weight = _xavier(most, query_width)

    def forward(
        self,
        q: Float[Tensor, "batch heads queries query_width"],
        k: Float[Tensor, "batch heads keys key_width"],
        mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        positions: tuple[Int[Tensor, "#batch queries"], Int[Tensor, "#batch keys"]] | None = None,
    ) -> Scored:
        if positions is None:
            return super().forward(q, k, mask)
        places = positions[1].expand(len(q), -1)
        read = places if mask is None else places.masked_fill(~mask.any(-2).any(1), 0)
        most = len(self.weight) - 1
        if not torch.compiler.is_compiling() and read.numel() and (int(read.min()) < 0 or int(read.max()) > most):
            raise InputError(
                f"positions: expected places of keys from 0 to {most}, got {int(read.min())} to {int(read.max())}; build "
                f"this alignment with most="
            )
        at = read.clamp(0, most)[:, None, None].expand(*q.shape[:3], -1)
        scores = (q @ self.weight.mT).gather(-1, at)
        return scores if mask is None else scores.masked_fill(~mask, -math.inf)

    def align(self, q: Tensor, k: Tensor) -> Scored:
        if k.shape[-2] > len(self.weight):
            raise InputError(
                f"k: {k.shape[-2]} keys, and this alignment knows {len(self.weight)} places; build it with most="
            )
        return q @ self.weight[: k.shape[-2]].mT


class FeatureAlignment(Alignment):
    """`w . act(W_1 phi_1(k) + W_2 phi_2(k) + b)`: by the keys alone, whatever is asked.

    Args:
        query_width, key_width: of a head; queries only count.
        hidden: width in between.
        features: two maps of the keys that keep their width; the keys and their squares by default.
        activation: tanh by default.
    """

    reads_queries = False

    def __init__(
        self,
        query_width: int,
        key_width: int,
        hidden: int = 32,
        features: tuple[Activation, Activation] | None = None,
        activation: Activation = torch.tanh,
    ) -> None:
        super().__init__(query_width, key_width)
        require_at_least(1, hidden=hidden)
        self.features = features or (_as_it_is, torch.square)
        self.weights = nn.ParameterList(_xavier(hidden, key_width) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out = _xavier(1, hidden)
        self.activation = activation

    def align(self, q: Tensor, k: Tensor) -> Scored:
        first, second = (f(k) @ w.mT for f, w in zip(self.features, self.weights, strict=True))
        scores = (self.activation(first + second + self.bias) @ self.out.mT).mT
        return scores.expand(*q.shape[:3], -1)


ALIGNMENTS: Mapping[str, Callable[..., Alignment]] = {
    "similarity": SimilarityAlignment,
    "dot": DotAlignment,
    "scaled dot": ScaledDotAlignment,
    "general": GeneralAlignment,
    "biased general": lambda q, k: GeneralAlignment(q, k, biased=True),
    "activated general": lambda q, k, activation=torch.tanh: GeneralAlignment(q, k, activation=activation),
    "kernel": KernelAlignment,
    "concat": ConcatAlignment,
    "additive": AdditiveAlignment,
    "deep": DeepAlignment,
    "location-based": LocationAlignment,
    "feature-based": FeatureAlignment,
}


def alignment(name: str, query_width: int, key_width: int | None = None, **settings: Any) -> Alignment:
    """An alignment function by its name.

    Args:
        name: one of `ALIGNMENTS`.
        query_width, key_width: of a head; keys as wide as queries where only one is given.
        settings: of that class: `hidden`, `activation`, `layers`, `most`, `feature`, `features`.

    Raises:
        InputError: for a name that is not known, or settings that it does not have.

    >>> alignment("additive", 4, 6, hidden=8)(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 6)).shape
    torch.Size([1, 1, 2, 3])
    """
    require_one_of(ALIGNMENTS, alignment=name)
    try:
        return ALIGNMENTS[name](query_width, query_width if key_width is None else key_width, **settings)
    except TypeError as error:
        raise InputError(f"alignment: {name!r} does not take {', '.join(settings)}") from error


def _xavier(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns)))


def _above_zero(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _as_it_is(x: Tensor) -> Tensor:
    return x
