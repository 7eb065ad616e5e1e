"""Windows that are pooled with weights of a softmax over their cells."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core.requirements import require_one_of
from cenote.pool.base import Pooled
from cenote.pool.spatial.base import WindowPool
from cenote.pool.spatial.windows import Size, sum_of_products

Grad = Literal["full", "weights"]
Cell = Float[Tensor, "batch channels *windows"]
Owned = Float[Tensor, "batch owners *windows"]


NUMBERS_AT_ONCE = 2**18
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
        require_one_of(("full", "weights"), grad=grad)
        self.grad = grad

    @abstractmethod
    def score(self, a: Cell, context: Cell) -> Owned:
        """The score of one cell of every window; `owners` is `channels`, or 1 where all of them share it."""

    def context(self, x: Float[Tensor, "batch channels *map"], cells: Sequence[Cell]) -> Cell:  # noqa: ARG002
        """A number between the smallest and the largest value of each window; the sums are taken around it.

        Args:
            x: the maps.
            cells: one tensor per cell of the kernel; 0 where a cell lies outside of the map.
        """
        return self.windows.mean(x)

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Cell:
        return self.finished(_weighted_sum(self, x).y)

    def attend(self, x: Float[Tensor, "*given"]) -> Pooled:
        """As calling the pool, and also the weights `[batch, channels, *windows, *kernel]` (without a batch as `x`).

        They sum to 1 over each window; `AdaUnpool2d` spreads pooled values back with them.
        """
        batch = self.as_batch(x)
        _, _, y, total, shares = _weighted_sum(self, batch)
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

    channels_apart = True
    """Whether each channel is pooled as if it were alone."""

    @abstractmethod
    def score_gradient(self, g: Owned, a: Cell, context: Cell) -> tuple[Tensor, Tensor | None]:
        """`(g ds/da, g ds/dcontext)`, `None` where the score does not read the context."""

    def pool(self, x: Float[Tensor, "batch channels *map"]) -> Cell:
        # a compiler decides by itself what to make again
        if torch.compiler.is_compiling():
            return super().pool(x)
        pooled = _Lean.apply if torch.is_grad_enabled() else _Lean.forward
        return self.finished(pooled(x, self))


class _Sums(NamedTuple):
    cells: Sequence[Cell]
    context: Cell
    y: Cell
    total: Owned
    shares: Sequence[Owned]


def _weighted_sum(pool: WeightedWindowPool, x: Float[Tensor, "batch channels *map"]) -> _Sums:
    cells = pool.windows.views(x)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        cells = [a.contiguous() for a in cells]
    context = pool.context(x, cells)
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
    return _Sums(cells, context, y, total, shares)


def _gradient(
    pool: LeanWindowPool, x: Float[Tensor, "batch channels *map"], g: Cell
) -> Float[Tensor, "batch channels *map"]:
    """`g dy/dx` of some maps, from the maps alone."""
    cells, context, y, total, shares = _weighted_sum(pool, x)
    at_context: Tensor | None = None
    g = g / total

    def by_cell() -> Iterator[Tensor]:
        nonlocal at_context
        for a, share in zip(cells, shares, strict=True):
            grad = g * share
            if pool.grad == "full":
                at_score = grad * (a - y)
                if share.shape[1] < at_score.shape[1]:
                    at_score = at_score.sum(1, keepdim=True)
                at_cell, more = pool.score_gradient(at_score, a, context)
                grad = grad + at_cell
                if more is not None:
                    at_context = more if at_context is None else at_context + more
            yield grad

    at_x = pool.windows.spread(by_cell(), x.shape[2:])
    if at_context is None:
        return at_x
    through_context = torch.func.vjp(lambda maps: pool.context(maps, pool.windows.views(maps)), x)[1]
    return at_x + through_context(at_context)[0]


class _Lean(torch.autograd.Function):
    """`_weighted_sum` that keeps nothing for the backward pass, a few maps at a time."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, pool: LeanWindowPool) -> Tensor:
        maps = _separate(pool, x)
        y = _joined((_weighted_sum(pool, part).y for part in _parts(maps)), len(maps))
        return y.view(*x.shape[:2], *y.shape[2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, LeanWindowPool], output: Tensor) -> None:  # noqa: ARG004
        x, ctx.pool = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        maps = _separate(ctx.pool, x)
        g = g.reshape(*maps.shape[:2], *g.shape[2:])
        parts = _parts(maps)
        pairs = zip(parts, g.split(max(1, len(parts[0]))), strict=True)
        return _joined((_gradient(ctx.pool, *pair) for pair in pairs), len(maps)).view(x.shape), None


def _separate(
    pool: LeanWindowPool, x: Float[Tensor, "batch channels *map"]
) -> Float[Tensor, "maps channels_of_each *map"]:
    """Every channel as a map of its own where the pool takes it as one, so that parts can be smaller."""
    return x.flatten(0, 1).unsqueeze(1) if pool.channels_apart and x.is_contiguous() else x


def _joined(parts: Iterable[Float[Tensor, "_maps *rest"]], maps: int) -> Float[Tensor, "maps *rest"]:
    """As `torch.cat`, of parts that are made one by one and not kept."""
    whole: Tensor | None = None
    done = 0
    for part in parts:
        if whole is None:
            if len(part) == maps:
                return part
            whole = part.new_empty((maps, *part.shape[1:]))
        whole[done : done + len(part)] = part
        done += len(part)
        # or it would wait beside the next
        del part
    assert whole is not None
    return whole


def _parts(x: Float[Tensor, "batch channels *map"]) -> Sequence[Tensor]:
    """A few maps at a time."""
    return x.split(max(1, NUMBERS_AT_ONCE // max(1, x[0].numel()))) if len(x) else [x]


def _inside(pool: WeightedWindowPool, x: Tensor) -> Sequence[Bool[Tensor, "*windows"] | None]:
    inside = pool.windows.inside(x.shape[2:], x.device)
    return [None] * pool.windows.cells if inside is None else inside


def _hidden(scores: Owned, there: Bool[Tensor, "*windows"] | None) -> Owned:
    return scores if there is None else scores.masked_fill(~there, float("-inf"))
