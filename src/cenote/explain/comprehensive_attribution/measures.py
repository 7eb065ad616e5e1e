"""How well a map covers what is known to matter, at the same area for every map; and the map that it is compared with.

Source: Zhang, Lee and Wang (2024), arXiv 2407.19308; Grad-CAM: Selvaraju et al. (2017), arXiv 1610.02391.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.explain.comprehensive_attribution.model import Comet, masked_pair, top_pixels


class Covered(NamedTuple):
    """Of each image, with the map cut to as many pixels as are true: these two are then the same; and `iou`."""

    coverage: Float[Tensor, "batch"]
    precision: Float[Tensor, "batch"]
    iou: Float[Tensor, "batch"]


class Accuracies(NamedTuple):
    """Of the predictor on masked images, of the detector on what is left (`None` without one), of both with other
    backgrounds."""

    masked: float
    left: float | None
    swapped: float


def covered(maps: Float[Tensor, "batch height width"], truth: Bool[Tensor, "batch height width"]) -> Covered:
    """Recall, precision and intersection over union at matched area.

    Args:
        maps: soft.
        truth: the pixels that matter; at least one in each image.

    >>> truth = torch.tensor([[[True, True], [False, False]]])
    >>> float(covered(torch.tensor([[[0.9, 0.1], [0.5, 0.0]]]), truth).coverage)
    0.5
    """
    if maps.shape != truth.shape or not bool(truth.flatten(1).any(1).all()):
        raise InputError(
            f"truth: expected {list(maps.shape)} as the maps, with a pixel in each, got {list(truth.shape)}"
        )
    counts = truth.flatten(1).sum(1)
    chosen = torch.cat([top_pixels(m[None], int(n)) for m, n in zip(maps, counts, strict=True)])
    both = (chosen & truth).flatten(1).sum(1).double()
    either = (chosen | truth).flatten(1).sum(1)
    return Covered(both / counts, both / counts, both / either)


@torch.no_grad()
def accuracies(
    comet: Comet,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    truth: Bool[Tensor, "items height width"],
) -> Accuracies:
    """How well the predictor sees what is masked, the detector what is left, and the predictor before another image's
    background.

    Args:
        comet: in eval mode.
        images, labels: any.
        truth: the pixels of the object; the others are taken from the next image, where that has no object either.
    """
    found = comet(images)
    left = None if found.left_logits is None else float((found.left_logits.argmax(1) == labels).double().mean())
    other = masked_pair(images.roll(1, 0), (~truth.roll(1, 0))[:, None].to(images), torch.zeros_like(images)).selected
    swapped = torch.where(truth[:, None], images, other)
    right = [float((comet.explained(x).logits.argmax(1) == labels).double().mean()) for x in (images, swapped)]
    return Accuracies(right[0], left, right[1])


@torch.no_grad()
def insertion_and_deletion(
    classifier: nn.Module,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    maps: Float[Tensor, "items height width"],
    fill: Float[Tensor, "items channels height width"],
    steps: int = 10,
) -> tuple[float, float]:
    """Mean probability of the class while pixels come in, and while they go out, those with the largest values first.

    Args:
        classifier: of images to logits.
        images, labels, maps: of these.
        fill: what stands where a pixel is not.
        steps: how many shares of the pixels.
    """
    require_at_least(1, steps=steps)
    pixels = maps[0].numel()
    found = []
    for n in range(steps + 1):
        mask = top_pixels(maps, round(n / steps * pixels))[:, None].to(images)
        for x in masked_pair(images, mask, fill):
            found.append(float(classifier(x).softmax(1).gather(1, labels[:, None]).mean()))
    return sum(found[::2]) / (steps + 1), sum(found[1::2]) / (steps + 1)


def grad_cam(
    classifier: nn.Module,
    layer: nn.Module,
    images: Float[Tensor, "items channels height width"],
    target: Int[Tensor, "items"] | None = None,
) -> Float[Tensor, "items height width"]:
    """`relu(sum_c mean(g_c) A_c)`, scaled up to the image: of a black box, as the rival at equal area.

    Args:
        classifier: of images to logits; left as it was.
        layer: of it, whose output `A` is `[batch, channels, height, width]`.
        images: any.
        target: classes; the classifier's own choice by default.
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, output: Tensor) -> Tensor:
        kept.append(output if output.requires_grad else output.detach().requires_grad_())
        return kept[-1]

    handle = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = classifier(images)
            chosen = logits.argmax(1) if target is None else target
            (g,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), kept[0])
    finally:
        handle.remove()
    cam = (g.mean((2, 3), keepdim=True) * kept[0].detach()).sum(1, keepdim=True).relu()
    return F.interpolate(cam, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
