"""The task's transformer, arms of equal size, and their training.

Source: Amsel, Yehudai and Bruna, "On the Benefits of Rank in Attention Layers" (2024), arXiv 2407.16153.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import cleared, real_tokens
from cenote.core.requirements import require_at_least, require_one_of
from cenote.core.seeded import seeded
from cenote.mix.rank_in_attention.layers import RankAttention
from cenote.mix.rank_in_attention.points import Points, nearest_points, scaled_error
from cenote.mix.scored_attention import ScoredAttention
from cenote.mix.trained import trained

Places = Literal["none", "added", "appended"]


class UnitNorm(nn.Module):
    """`s x / |x|`, s one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Each token for itself; zeros stay."""
        return self.scale * nn.functional.normalize(x, dim=-1)


class RankTransformer(nn.Module):
    """An encoder whose blocks sum several attention modules: `width_multiplier` times as many heads of rank `dim / heads`.

    Args:
        dim: of the points.
        heads: of each module; divides the width.
        layers: 1, 3 and 5 in the paper.
        width_multiplier: modules that are summed; 1, 8 and 64 in the paper.
        inner: width of the feed-forward layers.
        places: positions are `"added"` to the points or `"appended"` to them (as wide again), learned; they break the symmetry
            that the lower bound rests on.
        most: positions that are known.

    Raises:
        InputError: where heads do not divide the width.

    Source: Amsel et al. (2024), arXiv 2407.16153.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        layers: int = 1,
        width_multiplier: int = 1,
        inner: int = 2048,
        places: Places = "none",
        most: int = 16,
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, heads=heads, layers=layers, width_multiplier=width_multiplier)
        require_one_of(get_args(Places), places=places)
        width = 2 * dim if places == "appended" else dim
        if width % heads:
            raise InputError(f"heads: {heads} does not divide the width {width}")
        self.dim, self.places = dim, places
        self.positions = None if places == "none" else nn.Parameter(torch.randn(most, dim) / dim**0.5)
        self.attention = nn.ModuleList(
            nn.ModuleList(ScoredAttention(width, heads) for _ in range(width_multiplier)) for _ in range(layers)
        )
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(UnitNorm() for _ in range(2 * layers))
        self.output = nn.Linear(width, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """A prediction for each token; positions count the real ones.

        Raises:
            InputError: for more tokens than there are positions.
        """
        h = x = cleared(x, mask)
        if self.positions is not None:
            if x.shape[1] > len(self.positions):
                raise InputError(f"x: {x.shape[1]} tokens, and this model has {len(self.positions)} positions")
            own = self.positions[(real_tokens(x, mask).cumsum(1) - 1).clamp(min=0)]
            h = x + own if self.places == "added" else torch.cat([x, own], -1)
        for i, (modules, feed_forward) in enumerate(zip(self.attention, self.feed_forward, strict=True)):
            assert isinstance(modules, nn.ModuleList)
            h = self.norms[2 * i](h + torch.stack([m(h, mask) for m in modules]).sum(0))
            h = self.norms[2 * i + 1](h + feed_forward(h))
        return self.output(h)

    def attend(
        self, x: Float[Tensor, "batch keys dim"], y: Float[Tensor, "batch queries dim"]
    ) -> Float[Tensor, "batch queries dim"]:
        """Predictions for queries that stand behind the points."""
        return self(torch.cat([x, y], 1))[:, x.shape[1] :]


def parameters_of(dim: int, rank: int, heads: int) -> int:
    """`2 H r d + H d^2`, of `RankAttention`.

    >>> parameters_of(16, 16, 1), parameters_of(16, 4, 4)
    (768, 1536)
    """
    return 2 * heads * rank * dim + heads * dim**2


def rank_at_equal_size(dim: int, heads: int, like: tuple[int, int]) -> int:
    """The largest rank with which so many heads have no more parameters in Q and K than an arm `(heads, rank)`.

    Their `H r` is the same; values and outputs are full maps of every head.

    >>> rank_at_equal_size(16, 4, (1, 16))
    4
    """
    require_at_least(1, heads=heads)
    found = like[0] * like[1] // heads
    if found < 1:
        raise InputError(f"heads: {heads} heads leave no rank of {like[0]} x {like[1]} in {dim} dimensions")
    return found


def arms_of_equal_size(dim: int, budget: int) -> list[tuple[int, int]]:
    """Of every number of heads the largest rank, up to `dim`, with which there are no more parameters than the budget.

    >>> arms_of_equal_size(16, parameters_of(16, 16, 1))
    [(1, 16), (2, 4)]
    """
    found, heads = [], 1
    while (rank := min(dim, (budget // heads - dim**2) // (2 * dim))) >= 1:
        found.append((heads, rank))
        heads += 1
    return found


def compare_arms(
    arms: Sequence[tuple[int, int]],
    dim: int,
    points: int,
    steps: int = 1500,
    lr: float = 3e-3,
    batch: int = 256,
    seeds: Sequence[int] = range(5),
    plane: int | None = None,
) -> dict[tuple[int, int], list[float]]:
    """Error of each arm `(heads, rank)` on points that it was not trained on, of each seed.

    Args:
        arms: such as `arms_of_equal_size` gives.
        dim, points: of the task.
        steps, lr, batch: of the training.
        seeds: of parameters and points; the points of a seed are the same for all arms.
        plane: see `nearest_points`.
    """
    found: dict[tuple[int, int], list[float]] = {arm: [] for arm in arms}
    for seed in seeds:
        for heads, rank in arms:
            generator = torch.Generator().manual_seed(seed)
            draw = partial(nearest_points, dim=dim, points=points, plane=plane, generator=generator)
            held_out = draw(4 * batch)
            with seeded(seed):
                layer = RankAttention(dim, rank, heads)
            train_on_points(layer, _every_step(partial(draw, batch)), steps, lr)
            with torch.no_grad():
                found[heads, rank].append(float(scaled_error(layer.attend(held_out.x, held_out.y), held_out.target)))
    return found


def train_on_points(
    model: RankAttention | RankTransformer,
    draw: Callable[[int], Points],
    steps: int = 100_000,
    lr: float = 0.01,
) -> list[float]:
    """AdamW (.9, .95) without decay, 5 % warm-up, cosine to a tenth; published: 1,000 times 100 batches of 256, 5 seeds.

    Args:
        draw: points of each step.
        steps, lr: as published; a layer alone takes 3e-3 and 1,500 steps at small sizes.

    Returns:
        The error of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.0)

    def loss(step: int) -> Float[Tensor, ""]:
        points = draw(step)
        return scaled_error(model.attend(points.x, points.y), points.target)

    return trained(model, loss, optimizer, steps, warm_up=0.05, falls_to=0.1)


def _every_step(draw: Callable[[], Points]) -> Callable[[int], Points]:
    return lambda _: draw()
