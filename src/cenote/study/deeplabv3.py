"""The image-level branch gives a pyramid of small rates what it cannot reach: where every pixel has to answer the colour of
one patch anywhere in the image, it lifts pixel accuracy by at least 20 points.

Refuted if the image-level branch does not lift the accuracy of rates (1, 2, 3) by 20 points.

Also measured, not part of the rule: large rates without the branch, a head of 1 x 1 convolutions alone, and a second task in
which every pixel has to answer the colour of the patch in its own band of rows, which the mean of the image cannot tell: there
the branch should not help (by less than 5 points), and larger rates should.

Knocked out: what the branch sees (it is given the mean of another image of the batch, in training and test).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from cenote.pool import DeepLabV3Head
from cenote.pool.spatial.deeplabv3 import DeepLabV3ASPP
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, below, draw_arms, gate, seeds_of, study
from cenote.study.harness.global_cue import COLOURS, WIDTH, one_patch, patch_per_band, trained

SEEDS = {"small": 4, "full": 10}
SIDE = 24
STEPS: dict[Size, int] = {"smoke": 2, "small": 150, "full": 260}
TESTS: dict[Size, int] = {"smoke": 10, "small": 200, "full": 200}
SMALL, LARGE = (1, 2, 3), (4, 8, 12)
HEADS: dict[str, dict[str, Any]] = {
    "1 x 1 alone": {"rates": (), "image_pool": False},
    "rates 1, 2, 3": {"rates": SMALL, "image_pool": False},
    "rates 4, 8, 12": {"rates": LARGE, "image_pool": False},
    "rates 1, 2, 3, image": {"rates": SMALL, "image_pool": True},
    "rates 4, 8, 12, image": {"rates": LARGE, "image_pool": True},
}
NEAR, WITH_IMAGE, STRANGER = "rates 1, 2, 3", "rates 1, 2, 3, image", "rates 1, 2, 3, another image"
BANDS = (NEAR, WITH_IMAGE, "rates 4, 8, 12")


class StrangersASPP(DeepLabV3ASPP):
    """The pyramid whose image branch sees another image of the batch."""

    def _ranges(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        *parts, image = super()._ranges(x, mask)
        return [*parts, image.roll(1, 0)]


@study
def run(seed: int, size: Size) -> Findings:
    """Train heads with and without the image-level branch on a task that it solves and on one that it cannot."""
    seeds = seeds_of(seed, size, **SEEDS)
    whole, losses = Arms(), {}
    for name in (*HEADS, STRANGER):
        whole[name], losses[name] = _accuracy(name, one_patch, seeds, size)
    bands = Arms({name: _accuracy(name, patch_per_band, seeds, size)[0] for name in BANDS})

    def rule(arm: str) -> tuple[Check, ...]:
        return (above(f"one patch: accuracy, {arm}, minus {NEAR}", whole.minus(arm, NEAR), 0.2),)

    return Findings(
        seeds=seeds,
        parts=(Part(rule, WITH_IMAGE, knocked_out=(STRANGER,), against=(NEAR,)),),
        gates=(
            *(gate(name, above("accuracy", whole[name], 1 / COLOURS), losses[name]) for name in (WITH_IMAGE, NEAR)),
            gate(STRANGER, None, losses[STRANGER]),
        ),
        checks=(
            above(
                "one patch: accuracy, rates 1, 2, 3 with image",
                whole[WITH_IMAGE],
                expected=0.95,
                in_rule=False,
            ),
            above(
                "one patch: accuracy, rates 4, 8, 12 minus 1, 2, 3",
                whole.minus("rates 4, 8, 12", NEAR),
                expected=0.2,
                refuted=0.0,
                in_rule=False,
            ),
            below(
                "bands: accuracy, rates 1, 2, 3 with image minus without",
                bands.minus(WITH_IMAGE, NEAR),
                expected=0.05,
                in_rule=False,
            ),
            above(
                "bands: accuracy, rates 4, 8, 12 minus 1, 2, 3",
                bands.minus("rates 4, 8, 12", NEAR),
                expected=0.0,
                in_rule=False,
            ),
        ),
        table=[*whole.table("pixel accuracy, one patch"), *bands.table("pixel accuracy, bands")],
        figure=partial(_draw, whole=whole, bands=bands),
        notes=(
            f"Noise of {SIDE} x {SIDE} pixels, patches of {SIDE // 4} x {SIDE // 4} in one of {COLOURS} colours, "
            "no striding. Chance is a third. The paper's rates are for maps of 33 x 33 (513 pixels at output stride 16); "
            "4, 8, 12 reach as far here as 6, 12, 18 do there.",
        ),
    )


def _accuracy(name: str, scene: Any, seeds: tuple[int, ...], size: Size) -> tuple[tuple[float, ...], list[float]]:
    """Over the seeds, and the losses."""

    def head() -> nn.Module:
        if name != STRANGER:
            return DeepLabV3Head(WIDTH, COLOURS, WIDTH, **HEADS[name])
        strangers = DeepLabV3Head(WIDTH, COLOURS, WIDTH, **HEADS[WITH_IMAGE])
        strangers.aspp = StrangersASPP(WIDTH, WIDTH, **HEADS[WITH_IMAGE])
        return strangers

    model, shares = trained(head, scene, SIDE, seeds, STEPS[size], TESTS[size])
    return shares, model.losses


def _draw(figure: Any, whole: Arms, bands: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, whole, "pixel accuracy, one patch")
    draw_arms(right, bands, "pixel accuracy, a patch per band")
