"""The image-level branch gives a pyramid of small rates what it cannot reach: where every pixel has to answer the colour of
one patch anywhere in the image, it lifts pixel accuracy by at least 20 points.

Refuted if the image-level branch does not lift the accuracy of rates (1, 2, 3) by 20 points.

Also measured, not part of the rule: large rates without the branch, a head of 1 x 1 convolutions alone, and a second task in
which every pixel has to answer the colour of the patch in its own band of rows, which the mean of the image cannot tell: there
the branch should not help (by less than 5 points), and larger rates should.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from cenote.pool import DeepLabV3Head
from cenote.study.harness import Arms, Findings, Size, above, below, draw_arms, seeds_of, study
from cenote.study.harness.global_cue import COLOURS, WIDTH, one_patch, patch_per_band, trained

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
BANDS = ("rates 1, 2, 3", "rates 1, 2, 3, image", "rates 4, 8, 12")


@study
def run(seed: int, size: Size) -> Findings:
    """Train heads with and without the image-level branch on a task that it solves and on one that it cannot."""
    seeds = seeds_of(seed, size, small=4)
    whole = Arms({name: _accuracy(name, one_patch, seeds, size) for name in HEADS})
    bands = Arms({name: _accuracy(name, patch_per_band, seeds, size) for name in BANDS})
    small, with_image = "rates 1, 2, 3", "rates 1, 2, 3, image"
    return Findings(
        seeds=seeds,
        checks=(
            above("one patch: accuracy, rates 1, 2, 3 with image minus without", whole.minus(with_image, small), 0.2),
            above(
                "one patch: accuracy, rates 1, 2, 3 with image",
                whole[with_image],
                expected=0.95,
                in_rule=False,
            ),
            above(
                "one patch: accuracy, rates 4, 8, 12 minus 1, 2, 3",
                whole.minus("rates 4, 8, 12", small),
                expected=0.2,
                refuted=0.0,
                in_rule=False,
            ),
            below(
                "bands: accuracy, rates 1, 2, 3 with image minus without",
                bands.minus(with_image, small),
                expected=0.05,
                in_rule=False,
            ),
            above(
                "bands: accuracy, rates 4, 8, 12 minus 1, 2, 3",
                bands.minus("rates 4, 8, 12", small),
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


def _accuracy(name: str, scene: Any, seeds: tuple[int, ...], size: Size) -> tuple[float, ...]:
    def head() -> nn.Module:
        return DeepLabV3Head(WIDTH, COLOURS, WIDTH, **HEADS[name])

    return trained(head, scene, SIDE, seeds, STEPS[size], TESTS[size])[1]


def _draw(figure: Any, whole: Arms, bands: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, whole, "pixel accuracy, one patch")
    draw_arms(right, bands, "pixel accuracy, a patch per band")
