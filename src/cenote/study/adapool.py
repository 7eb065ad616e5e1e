"""AdaPool's learned mixture is not worse than either of its parts in a small convolutional net on digits (less one point), and
its pooled photographs, spread out again by the weights that pooled them, resemble the original more than averages repeated
over each window (peak signal to noise ratio).

Refuted if AdaPool classifies more than a point below the better of eDSCW and eM alone, or if unpooling is no better than
repeating averages.

Also measured, not part of the rule: how far the mixture's weights move from where they start, eDSCW against the mean on
photographs enlarged bilinearly, and accuracy against the mean and the maximum.
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
from cenote.study.harness import Arms, Findings, Size, above, between, draw_arms, seeds_of, study
from cenote.study.harness.photographs import CROPS, crops_of, psnr, ssim
from cenote.study.harness.training import accuracy
from cenote.study.harness.window_cnn import Build, images, over_seeds, trained_cnn

ADA, ROBUST, PEAK = "AdaPool", "eDSCW", "eM (SoftPool)"
# the maps after the two poolings of the net are 4 x 4 and 2 x 2
POOLS: dict[str, tuple[Build, Build]] = {
    "mean": (partial(nn.AvgPool2d, 2), partial(nn.AvgPool2d, 2)),
    "max": (partial(nn.MaxPool2d, 2), partial(nn.MaxPool2d, 2)),
    ROBUST: (partial(EDSCWPool2d, 2), partial(EDSCWPool2d, 2)),
    PEAK: (partial(SoftPool2d, 2), partial(SoftPool2d, 2)),
    ADA: (partial(AdaPool2d, 2, beta=torch.full((4, 4), 0.5)), partial(AdaPool2d, 2, beta=torch.full((2, 2), 0.5))),
}


@study
def run(seed: int, size: Size) -> Findings:
    """Compare the mixture with its parts in a small net; pool photographs and bring them back."""
    seeds = seeds_of(seed, size)
    test = over_seeds(images()[1], seeds)
    arms, moved = Arms(), Arms()
    for name, (first, second) in POOLS.items():
        model = trained_cnn(first, second, seeds, size)
        arms[name] = accuracy(model, test.x, test.y)
        if name == ADA:
            for layer in ("pool1", "pool2"):
                beta = in_unit_interval(model.parameters[f"{layer}.beta"].detach(), "clamp")
                moved[f"{layer}, largest change"] = tuple((beta - 0.5).abs().flatten(1).amax(1).tolist())
                moved[f"{layer}, mean"] = tuple(beta.flatten(1).mean(1).tolist())
    better = tuple(max(a, b) for a, b in zip(arms[ROBUST], arms[PEAK], strict=True))
    noise, similarity = _photographs(seeds, size)
    back, repeated = "unpooled by the weights", "averages repeated"
    return Findings(
        seeds=seeds,
        checks=(
            above(
                "digits: accuracy, AdaPool minus the better of its parts",
                tuple(a - b for a, b in zip(arms[ADA], better, strict=True)),
                expected=-0.01,
            ),
            above("photographs: decibels, unpooled minus averages repeated", noise.minus(back, repeated), expected=0.0),
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

    def enlarged(y: Tensor, mode: str) -> Tensor:
        return F.interpolate(y, scale_factor=2, mode=mode)

    ways: dict[str, Callable[[], Tensor]] = {
        "unpooled by the weights": lambda: unpool(*pool.attend(flat)),
        "averages repeated": lambda: enlarged(F.avg_pool2d(flat, 2), "nearest"),
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
