"""SoftPool keeps more of an image than the maximum: photographs pooled 2 x 2 and enlarged again resemble the original more
(structural similarity). And in a small convolutional net on digits it classifies at least as well as the mean (less one
point).

Refuted if its structural similarity is no higher than that of the maximum, or if its accuracy is more than a point below the
mean's.

Knocked out: the exponential weights (the mean), and their aim (each cell of a window has the weight of the cell before it).

Also measured, not part of the rule: SoftPool against the mean on photographs; photographs in 0 to 255, where SoftPool turns
into the maximum because `exp` sees larger differences; accuracy against the maximum, and with the gradient rule of the
authors' CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cenote.pool import EDSCWPool2d, SoftPool2d
from cenote.study.harness import (
    Arms,
    Check,
    Findings,
    Gate,
    Part,
    Size,
    above,
    below,
    between,
    draw_arms,
    gate,
    seeds_of,
    study,
)
from cenote.study.harness.photographs import CROP, CROPS, LEVELS, crops_of, psnr, ssim
from cenote.study.harness.training import accuracy
from cenote.study.harness.window_cnn import Build, images, over_seeds, trained_cnn

Pool = Callable[[Tensor], Tensor]
CHANCE = 0.11
ASTRAY, BLANK = "soft, weights moved", "one colour"


class Astray(nn.Module):
    """SoftPool 2 x 2 whose weights go to the wrong cells of each window."""

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        cells = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return (cells.softmax(-1).roll(1, -1) * cells).sum(-1)


PHOTO_POOLS: dict[str, Pool] = {
    "mean": nn.AvgPool2d(2),
    "max": nn.MaxPool2d(2),
    "soft": SoftPool2d(2),
    "eDSCW": EDSCWPool2d(2),
    "soft, 0 to 255": lambda x: SoftPool2d(2)(x * LEVELS) / LEVELS,
    ASTRAY: Astray(),
    BLANK: lambda x: x.mean((-2, -1), keepdim=True).expand(*x.shape[:-2], x.shape[-2] // 2, x.shape[-1] // 2),
}
DIGIT_POOLS: dict[str, Build] = {
    "mean": partial(nn.AvgPool2d, 2),
    "max": partial(nn.MaxPool2d, 2),
    "soft": partial(SoftPool2d, 2),
    "soft, weights held": partial(SoftPool2d, 2, grad="weights"),
    ASTRAY: Astray,
}


@study
def run(seed: int, size: Size) -> Findings:
    """Pool photographs and enlarge them again; compare poolings in a small net."""
    seeds = seeds_of(seed, size)
    crops = torch.stack([crops_of(s, CROPS[size]) for s in seeds])
    similarity, noise = Arms(), Arms()
    for name, pool in PHOTO_POOLS.items():
        pooled = pool(crops.flatten(0, 1))
        back = F.interpolate(pooled, scale_factor=2, mode="bilinear", align_corners=False).unflatten(0, crops.shape[:2])
        similarity[name] = tuple(ssim(a, b) for a, b in zip(crops, back, strict=True))
        noise[name] = tuple(psnr(a, b) for a, b in zip(crops, back, strict=True))
    test = over_seeds(images()[1], seeds)
    arms, losses = Arms(), {}
    for name, build in DIGIT_POOLS.items():
        model = trained_cnn(build, build, seeds, size)
        arms[name], losses[name] = accuracy(model, test.x, test.y), model.losses
    at_255 = tuple(abs(d) for d in similarity.minus("soft, 0 to 255", "max"))

    def rule(arm: str) -> tuple[Check, ...]:
        return (
            above(f"photographs: structural similarity, {arm} minus max", similarity.minus(arm, "max"), expected=0.0),
            above(f"digits: accuracy, {arm} minus mean", arms.minus(arm, "mean"), expected=-0.01),
        )

    def gates(arm: str) -> tuple[Gate, ...]:
        lead = similarity.minus(arm, BLANK)
        return (
            gate(arm, above("photographs: structural similarity minus that of one colour", lead, 0.0), None),
            gate(arm, above("digits: accuracy", arms[arm], CHANCE), losses[arm]),
        )

    return Findings(
        seeds=seeds,
        parts=(Part(rule, "soft", knocked_out=("mean", ASTRAY), against=("max",)),),
        gates=tuple(g for arm in ("soft", "mean", "max", ASTRAY) for g in gates(arm)),
        checks=(
            above(
                "digits: accuracy, soft minus mean, without the point", arms.minus("soft", "mean"), 0.0, in_rule=False
            ),
            between(
                "photographs: structural similarity, soft minus mean",
                similarity.minus("soft", "mean"),
                -0.005,
                0.005,
                in_rule=False,
            ),
            below("photographs in 0 to 255: distance of soft from max", at_255, expected=0.02, in_rule=False),
            above("digits: accuracy, soft minus max", arms.minus("soft", "max"), expected=0.0, in_rule=False),
            between(
                "digits: accuracy, weights held minus true gradient",
                arms.minus("soft, weights held", "soft"),
                -0.01,
                0.01,
                in_rule=False,
            ),
        ),
        table=[
            *similarity.table("structural similarity after enlarging"),
            *noise.table("peak signal to noise ratio, dB"),
            *arms.table("accuracy, 1,197 test digits"),
        ],
        figure=partial(_draw, similarity=similarity, arms=arms),
        notes=(
            f"Crops of {CROP} x {CROP} pixels at random places of the two photographs that come with scikit-learn, in [0, 1] "
            "unless said otherwise; the seeds differ in the places. Enlarged bilinearly.",
            "In [0, 1] the weights of a window differ by at most a factor e, so SoftPool lies close to the mean.",
        ),
    )


def _draw(figure: Any, similarity: Arms, arms: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, similarity, "structural similarity, pooled 2 x 2 and enlarged")
    draw_arms(right, arms, "accuracy, 1,197 test digits")
