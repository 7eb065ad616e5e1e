"""AdaPool's learned mixture is not worse than either of its parts in a small convolutional net on digits (less one point), and
its pooled photographs, spread out again by the weights that pooled them, resemble the original more than averages repeated
over each window (peak signal to noise ratio).

Refuted if AdaPool classifies more than a point below the better of eDSCW and eM alone, or if unpooling is no better than
repeating averages.

Also measured, not part of the rule: how far the mixture's weights move from where they start, eDSCW against the mean on
photographs enlarged bilinearly, and accuracy against the mean and the maximum.

Knocked out: that the mixture is learned (one half everywhere, frozen), and what the weights hold (unpooled by those of another
crop, and by the right ones dealt out anew within each window).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cenote.pool import AdaPool2d, AdaUnpool2d, EDSCWPool2d, SoftPool2d
from cenote.pool.spatial.unit import in_unit_interval
from cenote.study.harness import Arms, Check, Findings, Part, Size, above, between, draw_arms, gate, seeds_of, study
from cenote.study.harness.photographs import CROPS, crops_of, psnr, ssim
from cenote.study.harness.training import accuracy
from cenote.study.harness.window_cnn import Build, images, over_seeds, trained_cnn

CHANCE = 0.11

ADA, ROBUST, PEAK, FROZEN = "AdaPool", "eDSCW", "eM (SoftPool)", "AdaPool, mixture frozen"
BACK, REPEATED = "unpooled by the weights", "averages repeated"
FOREIGN, SHUFFLED = "unpooled by weights of another crop", "unpooled by shuffled weights"


def _halves(side: int, learnable: bool = True) -> AdaPool2d:
    return AdaPool2d(2, beta=torch.full((side, side), 0.5), learnable=learnable)


# the maps after the two poolings of the net are 4 x 4 and 2 x 2
POOLS: dict[str, tuple[Build, Build]] = {
    "mean": (partial(nn.AvgPool2d, 2), partial(nn.AvgPool2d, 2)),
    "max": (partial(nn.MaxPool2d, 2), partial(nn.MaxPool2d, 2)),
    ROBUST: (partial(EDSCWPool2d, 2), partial(EDSCWPool2d, 2)),
    PEAK: (partial(SoftPool2d, 2), partial(SoftPool2d, 2)),
    ADA: (partial(_halves, 4), partial(_halves, 2)),
    FROZEN: (partial(_halves, 4, learnable=False), partial(_halves, 2, learnable=False)),
}


@study
def run(seed: int, size: Size) -> Findings:
    """Compare the mixture with its parts in a small net; pool photographs and bring them back."""
    seeds = seeds_of(seed, size)
    test = over_seeds(images()[1], seeds)
    arms, moved, losses = Arms(), Arms(), {}
    for name, (first, second) in POOLS.items():
        model = trained_cnn(first, second, seeds, size)
        arms[name], losses[name] = accuracy(model, test.x, test.y), model.losses
        if name == ADA:
            for layer in ("pool1", "pool2"):
                beta = in_unit_interval(model.parameters[f"{layer}.beta"].detach(), "clamp")
                moved[f"{layer}, largest change"] = tuple((beta - 0.5).abs().flatten(1).amax(1).tolist())
                moved[f"{layer}, mean"] = tuple(beta.flatten(1).mean(1).tolist())
    better = tuple(max(a, b) for a, b in zip(arms[ROBUST], arms[PEAK], strict=True))
    noise, similarity = _photographs(seeds, size)

    def rule(arm: str) -> tuple[Check, ...]:
        lead = tuple(a - b for a, b in zip(arms[arm], better, strict=True))
        return (above(f"digits: accuracy, {arm} minus the better of its parts", lead, expected=-0.01),)

    def rule_of_unpooling(arm: str) -> tuple[Check, ...]:
        return (
            above(f"photographs: decibels, {arm} minus averages repeated", noise.minus(arm, REPEATED), expected=0.0),
        )

    return Findings(
        seeds=seeds,
        parts=(
            Part(rule, ADA, knocked_out=(FROZEN,), against=(ROBUST, PEAK)),
            Part(rule_of_unpooling, BACK, knocked_out=(FOREIGN, SHUFFLED), against=(REPEATED,)),
        ),
        gates=(
            *(gate(arm, above("accuracy", arms[arm], CHANCE), losses[arm]) for arm in (ADA, ROBUST, PEAK, FROZEN)),
            *(
                gate(
                    arm, above("decibels, minus the mean of the crop", noise.minus(arm, "mean of the crop"), 0.0), None
                )
                for arm in (BACK, REPEATED)
            ),
            gate(FOREIGN, None, None),
            gate(SHUFFLED, None, None),
        ),
        checks=(
            above(
                "digits: largest change of a weight of the mixture in the first layer",
                moved["pool1, largest change"],
                expected=0.05,
                in_rule=False,
            ),
            between(
                "photographs: structural similarity, eDSCW minus mean, enlarged",
                similarity.minus("eDSCW, enlarged", "mean, enlarged"),
                -0.005,
                0.005,
                in_rule=False,
            ),
            above("digits: accuracy, AdaPool minus mean", arms.minus(ADA, "mean"), expected=0.0, in_rule=False),
            above("digits: accuracy, AdaPool minus max", arms.minus(ADA, "max"), expected=0.0, in_rule=False),
        ),
        table=[
            *arms.table("accuracy, 1,197 test digits"),
            *moved.table("weight of eDSCW in the mixture"),
            *noise.table("peak signal to noise ratio, dB"),
            *similarity.table("structural similarity"),
        ],
        figure=partial(_draw, arms=arms, noise=noise),
        notes=(
            "Unpooling needs the weights of every window besides its pooled value, as many numbers as the image has: it shows "
            "what the weights hold, not that pooling loses nothing. The mean of a window is preserved.",
            "Crops of photographs and the net as in SoftPool's study; the mixture starts at 1/2 everywhere.",
        ),
    )


def _photographs(seeds: tuple[int, ...], size: Size) -> tuple[Arms, Arms]:
    """Decibels and structural similarity of photographs that were pooled 2 x 2 and brought back."""
    crops = torch.stack([crops_of(s, CROPS[size]) for s in seeds])
    flat = crops.flatten(0, 1)
    pool, unpool = AdaPool2d(2), AdaUnpool2d(2, preserve="mean")
    pooled, weights = pool.attend(flat)
    assert weights is not None
    places = torch.rand(weights.flatten(-2).shape, generator=torch.Generator().manual_seed(seeds[0])).argsort(-1)
    shuffled = weights.flatten(-2).gather(-1, places).view_as(weights)

    def enlarged(y: Tensor, mode: str) -> Tensor:
        return F.interpolate(y, scale_factor=2, mode=mode)

    ways: dict[str, Callable[[], Tensor]] = {
        BACK: lambda: unpool(pooled, weights),
        FOREIGN: lambda: unpool(pooled, weights.roll(1, 0)),
        SHUFFLED: lambda: unpool(pooled, shuffled),
        "mean of the crop": lambda: flat.mean((2, 3), keepdim=True).expand_as(flat),
        REPEATED: lambda: enlarged(F.avg_pool2d(flat, 2), "nearest"),
        "AdaPool repeated": lambda: enlarged(pool(flat), "nearest"),
        "mean, enlarged": lambda: enlarged(F.avg_pool2d(flat, 2), "bilinear"),
        "eDSCW, enlarged": lambda: enlarged(EDSCWPool2d(2)(flat), "bilinear"),
    }
    noise, similarity = Arms(), Arms()
    with torch.no_grad():
        for name, way in ways.items():
            made = way().unflatten(0, crops.shape[:2])
            noise[name] = tuple(psnr(a, b) for a, b in zip(crops, made, strict=True))
            similarity[name] = tuple(ssim(a, b) for a, b in zip(crops, made, strict=True))
    return noise, similarity


def _draw(figure: Any, arms: Arms, noise: Arms) -> None:
    left, right = figure.subplots(1, 2)
    draw_arms(left, arms, "accuracy, 1,197 test digits")
    draw_arms(right, noise, "decibels, photographs brought back")
