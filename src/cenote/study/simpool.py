"""Where one token out of many carries the answer, SimPool classifies better than the mean (by more than 10 points) and its
attention lands on that token (in more than 95 % of the sets).

Refuted if SimPool is at most 2 points above the mean, or if its largest weight lies on the digit in less than half of the
sets (chance: 6 %).

Each set has 16 tiles of 8 x 8 pixels: a digit at a random place and 15 other digits with shuffled pixels. Every tile goes
through the same small network, the tiles are pooled, a linear layer names the digit. Only the pooling differs between arms.

Knocked out: the attention (the query's map 0 and frozen, so that all weights are the same), and its aim (each tile is given the
weight of its neighbour, in training and test).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cenote.core import Tokens
from cenote.pool import GeM, MaxPool, MeanPool, Pool, Pooled, SimPool
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, draw_arms, gate, seeds_of, study
from cenote.study.harness.tiles import WIDTH, Tiles, classifiers, train_and_test
from cenote.study.harness.training import Together, accuracy

CHANCE = 0.11


class Even(SimPool):
    """SimPool without attention: every tile weighs the same."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        nn.init.zeros_(self.wq.weight).requires_grad_(False)


class Astray(SimPool):
    """SimPool that gives every tile the weight of the tile before it."""

    def attended(self, tokens: Tokens, need_weights: bool) -> Pooled:  # noqa: ARG002
        weights = super().attended(tokens, True).weights
        assert weights is not None
        weights = weights.roll(1, 1)
        return Pooled(tokens.weighted_sum(weights, self.norm_patches(tokens.values)).squeeze(1), weights)


EVEN, ASTRAY = "SimPool, uniform weights", "SimPool, weights moved"
POOLS: dict[str, Callable[[], Pool]] = {
    "mean": partial(MeanPool, WIDTH),
    "max": partial(MaxPool, WIDTH),
    "GeM": partial(GeM, WIDTH, p=4.0),
    "SimPool": partial(SimPool, WIDTH),
    "SimPool, gamma 1.25": partial(SimPool, WIDTH, gamma=1.25, beta=True),
    EVEN: partial(Even, WIDTH),
    ASTRAY: partial(Astray, WIDTH),
}


@study
def run(seed: int, size: Size) -> Findings:
    """Train one classifier per pooling and seed on distractor tiles; compare accuracy and look at the attention."""
    seeds = seeds_of(seed, size)
    train, test = train_and_test(seeds, size)
    arms, hits, losses = Arms(), Arms(), {}
    for name, pool in POOLS.items():
        model = classifiers(pool, train, seeds, size)
        arms[name], losses[name] = accuracy(model, test.x, test.y), model.losses
        if name.startswith("SimPool"):
            weights = _weights(model, test)
            hits[name] = tuple((weights.argmax(-1) == test.place).double().mean(1).tolist())
            if name == "SimPool":
                pictured = test.x[0, 0], weights[0, 0]

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"accuracy, {arm} minus mean", arms.minus(arm, "mean"), expected=0.10, refuted=0.02),
            above(f"largest weight of {arm} on the digit", hits[arm], expected=0.95, refuted=0.50),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, "SimPool", knocked_out=(EVEN, ASTRAY), against=("mean",)),),
        gates=(
            *(gate(name, above("accuracy", arms[name], CHANCE), losses[name]) for name in ("SimPool", "mean", EVEN)),
            gate(ASTRAY, None, losses[ASTRAY]),
        ),
        checks=(
            above("accuracy, SimPool minus max", arms.minus("SimPool", "max"), expected=0.0, in_rule=False),
            above("accuracy, SimPool minus GeM", arms.minus("SimPool", "GeM"), expected=0.0, in_rule=False),
            above("accuracy, gamma 1.25 minus none", arms.minus("SimPool, gamma 1.25", "SimPool"), 0.0, in_rule=False),
        ),
        table=arms.table("accuracy") + hits.table("largest weight on the digit"),
        figure=partial(_draw, arms=arms, tiles=pictured[0], weights=pictured[1]),
        notes=(
            "The seeds differ in initialisation, in where the digits stand, in the distractors and in the order of training; "
            "the 1,200 training and 597 test digits are the same.",
        ),
    )


@torch.no_grad()
def _weights(model: Together, test: Tiles) -> Float[Tensor, "seeds items tiles"]:
    attended = [m.pool.attend(m.encoder(x)).weights for m, x in zip(model.modules(), test.x, strict=True)]
    return torch.stack(attended).mean(2)


def _draw(figure: Any, arms: Arms, tiles: Tensor, weights: Tensor) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_arms(left, arms, "accuracy, 597 test sets of 16 tiles")
    side = 8
    right.imshow(tiles.view(4, 4, side, side).transpose(1, 2).reshape(4 * side, 4 * side).numpy(), cmap="gray_r")
    for n, w in enumerate(weights.tolist()):
        corner = (n % 4 * side - 0.5, n // 4 * side - 0.5)
        right.add_patch(_rectangle(corner, side, alpha=w))
    right.set_axis_off()
    right.set_title("one set, SimPool's weights in orange", fontsize=9)


def _rectangle(corner: tuple[float, float], side: int, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, side, side, facecolor="#e8710a", edgecolor="none", alpha=0.75 * alpha)
