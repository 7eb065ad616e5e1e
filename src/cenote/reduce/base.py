"""What every reducer takes and gives, and how few tokens are asked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.errors import InputError
from cenote.core.reduced import Reduced, in_order
from cenote.core.requirements import require_floating, require_one_of

TOKEN_AXIS: Mapping[str, int] = {"attention": 2, "keys": 2, "values": 2}
"""Where a signal has its tokens; all others have them behind the batch."""


_POSSIBLE: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "factor": (lambda v: v >= 1 and math.isfinite(v), "a number from 1"),
    "tokens": (lambda v: isinstance(v, int) and v >= 1, "a whole number from 1"),
    "fraction": (lambda v: 0 < v <= 1, "a share above 0 and at most 1"),
}


@dataclass(frozen=True)
class Budget:
    """How many tokens may be left of each set: one of a factor, a number, a share.

    A set that has fewer is left as it is; of one that has any, at least one is left.

    Attributes:
        factor: of `n` tokens `n / factor` are left; 1 or more, 1.5 too.
        tokens: so many are left of every set.
        fraction: this share of the tokens is left, above 0, at most 1.
        rounding: `"floor"` (at most so many) or `"ceil"`.

    Raises:
        InputError: unless exactly one of the three is given, and possible.

    Example:
        >>> Budget(factor=4).of(torch.tensor([0, 3, 9, 16])).tolist()
        [0, 1, 2, 4]
        >>> Budget(tokens=4).of(torch.tensor([3, 9])).tolist()
        [3, 4]
    """

    factor: float | None = None
    tokens: int | None = None
    fraction: float | None = None
    rounding: Literal["floor", "ceil"] = "floor"

    def __post_init__(self) -> None:
        require_one_of(("floor", "ceil"), rounding=self.rounding)
        given = {n: v for n in ("factor", "tokens", "fraction") if (v := getattr(self, n)) is not None}
        if len(given) != 1:
            raise InputError(
                f"budget: expected one of factor, tokens, fraction, got {', '.join(given) if given else 'none'}"
            )
        ((name, number),) = given.items()
        fits, expected = _POSSIBLE[name]
        if isinstance(number, bool) or not isinstance(number, int | float) or not fits(number):
            raise InputError(f"{name}: expected {expected}, got {number!r}")

    def of(self, lengths: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        """How many are left of sets of these lengths."""
        if self.tokens is not None:
            return lengths.clamp(max=int(self.tokens))
        exact = lengths.double() / self.factor if self.factor is not None else lengths.double() * (self.fraction or 0.0)
        # 0.29 * 100 is 28.999999999999996
        exact = exact.mul(1e9).round().div(1e9)
        counts = (exact.floor() if self.rounding == "floor" else exact.ceil()).to(lengths.dtype)
        return torch.minimum(counts.clamp(min=1), lengths)


class Reducer(nn.Module, ABC):
    """Base of what turns the tokens of a set into fewer.

    A reducer defines `reduce(x, sizes, mask, **signals)`; that padding, what stands in it, half precision and protected tokens
    are of no concern to it, is done here once.

    Attributes:
        needs: names of the signals that it must be given besides the tokens: `"attention"` `[batch, heads, tokens]`, what each
            token was given by the queries that count; `"keys"` and `"values"` `[batch, kv_heads, tokens, width]`; others
            `[batch, tokens, ...]`.
        keeps: `"members"`: what is left are rows of the input; `"means"`: convex combinations of rows; `"directions"`: such
            combinations brought to unit length.
        mean_weights: what means are weighed by: the sizes alone, or something of the class's own besides.
        counts: how many are left: `"exact"`, `"at most"` (fewer where tokens can't be told apart), or `"free"` (by what the
            tokens are, without a budget).
        order_matters: whether other tokens are put together where the tokens come in another order.
    """

    method_kind: ClassVar[str] = "tokens"

    needs: ClassVar[frozenset[str]] = frozenset()
    keeps: Literal["members", "means", "directions"] = "means"
    mean_weights: Literal["sizes", "own"] = "sizes"
    counts: Literal["exact", "at most", "free"] = "exact"
    order_matters: bool = False

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        protect: Bool[Tensor, "batch tokens"] | int | None = None,
        **signals: Tensor,
    ) -> Reduced:
        """Fewer tokens, in the order of their first originals.

        Args:
            x: the tokens; what stands in padding, NaN included, reaches nothing.
            sizes: how many originals each stands for already, None for 1.
            mask: True = a real token, None for all.
            protect: tokens that stay as they are, in place, and count for no budget; a number for the first so many real
                ones.
            signals: those that the class `needs`.

        Raises:
            InputError: for shapes that do not fit, signals that lack or that nobody asked for, and real tokens that are NaN or
                infinite.
        """
        mask, protected = self._checked(x, sizes, mask, protect, signals)
        asked = mask & ~protected
        # some distances have no half-precision kernel, and all lose too many digits in it
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        wide = torch.where(asked.unsqueeze(-1), wide, torch.zeros_like(wide))
        clean = {name: _clean(name, signal, asked) for name, signal in signals.items()}
        given = torch.ones_like(wide[..., 0]) if sizes is None else sizes.to(wide.dtype)
        if not x.shape[1]:
            return Reduced(x, given, mask.long(), mask)
        found = self.reduce(wide, torch.where(asked, given, torch.zeros_like(given)), asked, **clean)
        found = found._replace(tokens=found.tokens.to(x.dtype))
        return in_order(_beside(found, x, given, protected) if bool(protected.any()) else found)

    @abstractmethod
    def reduce(
        self,
        x: Float[Tensor, "batch tokens dim"],
        sizes: Float[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"],
        *_: Any,
        **signals: Any,
    ) -> Reduced:
        """Fewer tokens, in any order.

        Args:
            x: float32 or float64, zeros where the mask is False.
            sizes: zeros where the mask is False.
            mask: the tokens that may be reduced; a set may have none.
            signals: those of `needs`, zeros where the mask is False.

        Returns:
            Of padding the assignment is -1.
        """

    def _checked(
        self,
        x: Tensor,
        sizes: Tensor | None,
        mask: Tensor | None,
        protect: Tensor | int | None,
        signals: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The mask, and which tokens are protected."""
        if x.dim() != 3:
            raise InputError(f"x: expected [batch, tokens, dim], got {list(x.shape)}")
        require_floating(x)
        form = x.shape[:2]
        by_name = {"sizes": sizes, "mask": mask, "protect": protect if isinstance(protect, Tensor) else None}
        for name, value in by_name.items():
            if value is not None and value.shape != form:
                raise InputError(f"{name}: expected {list(form)} as the tokens, got {list(value.shape)}")
        for name in ("mask", "protect"):
            value = by_name[name]
            if value is not None and value.dtype != torch.bool:
                raise InputError(f"{name}: expected bool, got {value.dtype}")
        if missing := sorted(self.needs - set(signals)):
            raise InputError(f"{missing[0]}: {type(self).__name__} needs it and was not given it")
        if unasked := sorted(set(signals) - self.needs):
            asks = ", ".join(sorted(self.needs)) or "nothing besides the tokens"
            raise InputError(f"{unasked[0]}: {type(self).__name__} asks for {asks}")
        for name, signal in signals.items():
            axis = TOKEN_AXIS.get(name, 1)
            if signal.dim() <= axis or (signal.shape[0], signal.shape[axis]) != tuple(form):
                raise InputError(
                    f"{name}: expected {form[0]} items and {form[1]} tokens on axis {axis}, got {list(signal.shape)}"
                )
        mask = torch.ones(form, dtype=torch.bool, device=x.device) if mask is None else mask
        if not bool(torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x)).isfinite().all()):
            raise InputError("x: real tokens are NaN or infinite; leave them out with the mask")
        if protect is None:
            return mask, torch.zeros_like(mask)
        if isinstance(protect, int):
            if protect < 0:
                raise InputError(f"protect: expected at least 0, got {protect}")
            return mask, mask & (mask.cumsum(1) <= protect)
        return mask, mask & protect


class BudgetReducer(Reducer):
    """Base of the reducers whose counts are known before they see a token.

    Args:
        factor, tokens, fraction, rounding: as `Budget`.
    """

    def __init__(
        self,
        *,
        factor: float | None = None,
        tokens: int | None = None,
        fraction: float | None = None,
        rounding: Literal["floor", "ceil"] = "floor",
    ) -> None:
        super().__init__()
        self.budget = Budget(factor, tokens, fraction, rounding)

    def extra_repr(self) -> str:
        given = {n: getattr(self.budget, n) for n in ("factor", "tokens", "fraction")}
        return ", ".join(f"{name}={value:g}" for name, value in given.items() if value is not None)


def _clean(name: str, signal: Tensor, mask: Bool[Tensor, "batch tokens"]) -> Tensor:
    form = [1] * signal.dim()
    form[0], form[TOKEN_AXIS.get(name, 1)] = mask.shape
    signal = signal.float() if signal.dtype in (torch.float16, torch.bfloat16) else signal
    return torch.where(mask.view(form), signal, torch.zeros_like(signal))


def _beside(found: Reduced, x: Tensor, sizes: Tensor, protected: Bool[Tensor, "batch tokens"]) -> Reduced:
    """The same with the protected tokens, each on its own, behind it."""
    left = found.sizes.shape[1]
    own = torch.arange(x.shape[1], device=x.device).expand(len(x), -1) + left
    return Reduced(
        torch.cat([found.tokens, x.masked_fill(~protected.unsqueeze(-1), 0.0)], 1),
        torch.cat([found.sizes, sizes.masked_fill(~protected, 0.0)], 1),
        torch.where(protected, own, found.assignment),
        torch.cat([found.real, protected], 1),
    )
