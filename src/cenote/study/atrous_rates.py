"""The best atrous rates follow the size of the map: in a net without an image-level branch the best multiplier `g` of rates
(g, 2g, 3g) is at least 1.5 times as large on maps of twice the side, and the rule of `recommend_rates` comes within 5 points
of the best.

Refuted if the same multiplier is best at both sizes, or if the rule's rates are 5 points or more below the best.

Every pixel has to answer the colour of one patch, a quarter as wide as the image. Also shown, not part of the rule: the
effective receptive field of a trained net.

Knocked out: the reach (rates of the side of the map, at which all taps but the middle one of each filter see padding alone, so
that the multiplier makes no difference).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.pool import DeepLabV3Head, effective_receptive_field, recommend_rates
from cenote.study.harness import (
    Arms,
    Check,
    Findings,
    Part,
    Size,
    above,
    below,
    draw_arms,
    draw_picture,
    gate,
    seeds_of,
    study,
)
from cenote.study.harness.global_cue import COLOURS, WIDTH, one_patch, trained

SEEDS = {"small": 4, "full": 10}
SIDES = (12, 24)
MULTIPLIERS: dict[Size, tuple[int, ...]] = {
    "smoke": (2, 4),
    "small": (1, 2, 3, 4, 6, 8),
    "full": (1, 2, 3, 4, 6, 8, 12),
}
STEPS: dict[Size, int] = {"smoke": 2, "small": 150, "full": 260}
TESTS: dict[Size, int] = {"smoke": 10, "small": 200, "full": 200}
RULE = "the rule"
REACHING, CENTRE = "atrous filters", "middle taps alone"


@study
def run(seed: int, size: Size) -> Findings:
    """Train a pyramid at each multiplier and at the rule's rates, on two sizes of image."""
    seeds = seeds_of(seed, size, **SEEDS)
    arms = {side: Arms() for side in SIDES}
    losses: dict[str, list[list[float]]] = {REACHING: [], CENTRE: []}
    names = [f"g = {g}" for g in MULTIPLIERS[size]]
    field = None
    for side, of_side in arms.items():
        nets = {f"g = {g}": (g, 2 * g, 3 * g) for g in MULTIPLIERS[size]}
        for name, rates in {**nets, RULE: recommend_rates(side, 1), CENTRE: (side,) * 3}.items():
            model, of_side[name] = _trained(rates, side, seeds, size)
            losses[CENTRE if name == CENTRE else REACHING].append(model.losses)
            if name == RULE and side == SIDES[-1]:
                images = one_patch(32 if size != "smoke" else 2, side, torch.Generator().manual_seed(seed)).x
                field = effective_receptive_field(model.module(0), images)
    assert field is not None
    # without reach all multipliers give one and the same net
    by_arm = {
        REACHING: arms,
        CENTRE: {side: Arms(dict.fromkeys([*names, RULE], of_side[CENTRE])) for side, of_side in arms.items()},
    }
    best = {
        arm: {side: tuple(_best(a, i, MULTIPLIERS[size]) for i in range(len(seeds))) for side, a in by_side.items()}
        for arm, by_side in by_arm.items()
    }
    small, large = SIDES

    def rule(arm: str) -> tuple[Check, ...]:
        growth = [b / a for a, b in zip(best[arm][small], best[arm][large], strict=True)]
        return (
            above(f"best multiplier at twice the side over the best at one, {arm}", growth, expected=1.5, refuted=1.0),
            *(
                below(
                    f"{side} x {side}: accuracy, best of the multipliers minus the rule, {arm}",
                    _lost(of_side, MULTIPLIERS[size]),
                    expected=0.05,
                )
                for side, of_side in by_arm[arm].items()
            ),
        )

    worst = [min(a[name][i] for a in arms.values() for name in (*names, RULE)) for i in range(len(seeds))]
    return Findings(
        seeds=seeds,
        parts=(Part(rule, REACHING, knocked_out=(CENTRE,)),),
        gates=(
            gate(REACHING, above("smallest accuracy of all its nets", worst, 1 / COLOURS), losses[REACHING]),
            gate(CENTRE, None, losses[CENTRE]),
        ),
        checks=(),
        table=[
            *(row for side, of_side in arms.items() for row in of_side.table(f"pixel accuracy, {side} x {side}")),
            *Arms({f"{side} x {side}": tuple(map(float, b)) for side, b in best[REACHING].items()}).table(
                "best multiplier"
            ),
        ],
        figure=partial(_draw, arms=arms, multipliers=MULTIPLIERS[size], field=field),
        notes=(
            f"The rule's rates: {', '.join(f'{recommend_rates(s, 1)} at {s} x {s}' for s in SIDES)}. The best multiplier is "
            "that of each seed; where neighbours are equally good it is partly chance.",
            "Images are noise of deviation 0.5 without striding, so that the side of the image is the side of the map. The "
            "paper's data sets and networks are not used here.",
        ),
    )


def _trained(rates: tuple[int, ...], side: int, seeds: tuple[int, ...], size: Size) -> tuple[Any, tuple[float, ...]]:
    head = partial(DeepLabV3Head, WIDTH, COLOURS, WIDTH, rates, image_pool=False)
    return trained(head, one_patch, side, seeds, STEPS[size], TESTS[size])


def _best(arms: Arms, seed: int, multipliers: tuple[int, ...]) -> int:
    return max(multipliers, key=lambda g: arms[f"g = {g}"][seed])


def _lost(arms: Arms, multipliers: tuple[int, ...]) -> tuple[float, ...]:
    best = [max(arms[f"g = {g}"][i] for g in multipliers) for i in range(len(arms[RULE]))]
    return tuple(b - r for b, r in zip(best, arms[RULE], strict=True))


def _draw(figure: Any, arms: dict[int, Arms], multipliers: tuple[int, ...], field: Float[Tensor, "h w"]) -> None:
    first, second, third = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for side, of_side in arms.items():
        means = [sum(of_side[f"g = {g}"]) / len(of_side[RULE]) for g in multipliers]
        first.plot([3 * g / side for g in multipliers], means, "o-", label=f"{side} x {side}")
    first.set_xlabel("largest rate / side of the map")
    first.set_ylabel("pixel accuracy")
    first.legend(frameon=False)
    first.spines[["top", "right"]].set_visible(False)
    draw_arms(second, arms[SIDES[-1]], f"pixel accuracy, {SIDES[-1]} x {SIDES[-1]}")
    draw_picture(third, field.sqrt(), "where the middle looks", cmap="viridis")
