"""Windows that are pooled with weights of a softmax over their cells."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.errors import InputError
from cenote.pool.base import Pooled
from cenote.pool.spatial.base import WindowPool
from cenote.pool.spatial.windows import Size, sum_of_products

Grad = Literal["full", "weights"]
Cell = Float[Tensor, "batch channels *windows"]
Owned = Float[Tensor, "batch owners *windows"]


NUMBERS_AT_ONCE = 2**19
"""Numbers of the map in one step: its cells, scores and weights then stay in the cache."""


class WeightedWindowPool(WindowPool):
    """Base of the pools `y = sum_i w_i a_i` with `w = softmax_i(s_i)` over the cells `i` of each window.

    A pool defines `score(a, context)`, what a cell scores in view of what `context` says of its window. Cells outside of the
    map have weight 0. One that knows the gradient of its score is better a `LeanWindowPool`.

    Args:
        kernel_size, stride, padding, ceil_mode: as in `WindowPool`.
        grad: `"full"`: the true derivative; `"weights"`: with the weights held constant, `dy/da_i = w_i`.
    """

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        grad: Grad = "full",
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode)
        if grad not in ("full", "weights"):
            raise InputError(f"grad: expected 'full' or 'weights', got {grad!r}")
        self.grad = grad

    @abstractmethod
    def score(self, a: Cell, context: Cell) -> Owned:
        """The score of one cell of every window; `owners` is `channels`, or 1 where all of them share it."""

    def context(self, x: Float[Tensor, "batch channels *map"]) -> Cell:
        """A number between the smallest and the largest value of each window; the sums are taken around it."""
        return self.windows.mean(x)

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Cell:
        return self.finished(_weighted_sum(self, x, self.context(x)).y)

    def attend(self, x: Float[Tensor, "*given"]) -> Pooled:
        """As calling the pool, and also the weights `[batch, channels, *windows, *kernel]` (without a batch as `x`).

        They sum to 1 over each window; `AdaUnpool2d` spreads pooled values back with them.
        """
        batch = self.as_batch(x)
        _, y, total, shares = _weighted_sum(self, batch, self.context(batch))
        weights = torch.stack([e / total for e in shares], -1).unflatten(-1, self.kernel_size)
        weights = weights.expand(-1, batch.shape[1], *[-1] * (2 * self.dims))
        return Pooled(self.as_given(self.finished(y), x), self.as_given(weights, x))

    def finished(self, y: Cell) -> Cell:
        """What becomes of the weighted sums."""
        return y


class LeanWindowPool(WeightedWindowPool):
    """Base of the weighted pools that know the gradient of their score.

    Maps are read a few at a time, training keeps no number per cell, and scores and weights are made again in the backward
    pass.

    Args:
        kernel_size, stride, padding, ceil_mode, grad: as in `WeightedWindowPool`.
    """

    @abstractmethod
    def score_gradient(self, g: Owned, a: Cell, context: Cell) -> tuple[Tensor, Tensor | None]:
        """`(g ds/da, g ds/dcontext)`, `None` where the score does not read the context."""

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Cell:
        # a compiler decides by itself what to make again
        if torch.compiler.is_compiling():
            return super().pool(x)
        if torch.is_grad_enabled():
            return self.finished(_Lean.apply(x, self.context(x), self))  # type: ignore[no-untyped-call]
        return self.finished(torch.cat([_weighted_sum(self, part, self.context(part)).y for part in _parts(x)]))


class _Sums(NamedTuple):
    cells: Sequence[Cell]
    y: Cell
    total: Owned
    shares: Sequence[Owned]


def _weighted_sum(pool: WeightedWindowPool, x: Float[Tensor, "batch channels *map"], context: Cell) -> _Sums:
    cells = pool.windows.views(x)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        cells = [a.contiguous() for a in cells]
    scores = [pool.score(a, context) for a in cells]
    scores = [_hidden(s, there) for s, there in zip(scores, _inside(pool, x), strict=True)]
    top = functools.reduce(torch.maximum, (s.detach() for s in scores))
    shares = [(s - top).exp() for s in scores]
    if pool.grad == "weights":
        shares = [e.detach() for e in shares]
    total = functools.reduce(torch.add, shares)
    # seen from a number near the result, large values neither overflow nor cancel, and their gradients stay exact
    centre = context.detach()
    y = centre + sum_of_products(shares, [a - centre for a in cells]) / total
    return _Sums(cells, y, total, shares)


def _gradients(
    pool: LeanWindowPool, x: Float[Tensor, "batch channels *map"], context: Cell, g: Cell
) -> tuple[Float[Tensor, "batch channels *map"], Cell | None]:
    """`g dy/dx` and `g dy/dcontext` of some maps, from the maps alone."""
    cells, y, total, shares = _weighted_sum(pool, x, context)
    at_context: Tensor | None = None

    def by_cell() -> Iterator[Tensor]:
        nonlocal at_context
        for a, share in zip(cells, shares, strict=True):
            grad = g * (share / total)
            if pool.grad == "full":
                at_score = grad * (a - y)
                if share.shape[1] < at_score.shape[1]:
                    at_score = at_score.sum(1, keepdim=True)
                at_cell, more = pool.score_gradient(at_score, a, context)
                grad = grad + at_cell
                if more is not None:
                    at_context = more if at_context is None else at_context + more
            yield grad

    return pool.windows.spread(by_cell(), x.shape[2:]), at_context


class _Lean(torch.autograd.Function):
    """`_weighted_sum` that keeps no number per cell for the backward pass, a few maps at a time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, context: Tensor, pool: LeanWindowPool) -> Tensor:
        parts = _parts(x)
        pairs = zip(parts, context.split(max(1, len(parts[0]))), strict=True)
        return torch.cat([_weighted_sum(pool, part, its).y for part, its in pairs])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, LeanWindowPool], output: Tensor) -> None:  # noqa: ARG004
        x, context, ctx.pool = inputs
        ctx.save_for_backward(x, context)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, context = ctx.saved_tensors
        parts = _parts(x)
        step = max(1, len(parts[0]))
        found = [_gradients(ctx.pool, *part) for part in zip(parts, context.split(step), g.split(step), strict=True)]
        at_context = [c for _, c in found if c is not None]
        return torch.cat([at_x for at_x, _ in found]), torch.cat(at_context) if at_context else None, None


def _parts(x: Float[Tensor, "batch channels *map"]) -> Sequence[Tensor]:
    """A few maps at a time."""
    return x.split(max(1, NUMBERS_AT_ONCE // max(1, x[0].numel()))) if len(x) else [x]


def _inside(pool: WeightedWindowPool, x: Tensor) -> Sequence[Bool[Tensor, "*windows"] | None]:
    inside = pool.windows.inside(x.shape[2:], x.device)
    return [None] * pool.windows.cells if inside is None else inside


def _hidden(scores: Owned, there: Bool[Tensor, "*windows"] | None) -> Owned:
    return scores if there is None else scores.masked_fill(~there, float("-inf"))
