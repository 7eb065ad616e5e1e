"""Extremal masks of images and of an inner layer's channels, of a classifier that is there.

Source: Fong, Patrick and Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks" (2019),
arXiv 1910.08485.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of
from cenote.explain.base import Attribution, Explainer
from cenote.explain.extremal_perturbations.masks import BLUR, LEVELS, Perturbing, Smoothing, require_areas
from cenote.explain.extremal_perturbations.optimise import (
    AREA_WEIGHT,
    ITERATIONS,
    ExtremalMasks,
    Reward,
    Variant,
    ascend,
    extremal_masks,
    reward,
)
from cenote.explain.images import chosen, class_scores, image_in, require_eval, scored
from cenote.models.live.passing import passing

INVERSION_RATE = 0.05


class ExtremalPerturbation(Explainer):
    """Which share of an image suffices: the smooth mask of a given area that keeps the score of a class highest.

    One optimisation per image, all areas in one batch: `iterations` runs of the model forward and backward. CNNs and ViTs, and
    models that score every place of a map, whose mean counts.

    Args:
        areas: shares of the image; the attribution is the mean of their masks.
        variant, perturbing, kind, iterations, step, sigma, levels, blur, jitter, smoothing, area_weight, smooth: as of
            `extremal_masks`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> explainer = ExtremalPerturbation((0.2,), iterations=3, step=4, sigma=4)
        >>> explainer.explain(model, {"input": torch.rand(1, 3, 12, 16)}).scores.shape
        torch.Size([1, 192])

    Source: Fong, Patrick and Vedaldi (2019), arXiv 1910.08485.
    """

    family = "perturbation"

    def __init__(
        self,
        areas: Sequence[float] = (0.1,),
        *,
        variant: Variant = "preserve",
        perturbing: Perturbing = "blur",
        kind: Reward = "simple",
        iterations: int = ITERATIONS,
        step: int = 7,
        sigma: int = 21,
        levels: int = LEVELS,
        blur: float = BLUR,
        jitter: bool = True,
        smoothing: Smoothing = "smooth maximum",
        area_weight: float = AREA_WEIGHT,
        smooth: float = 0.0,
    ) -> None:
        require_areas(areas)
        require_at_least(1, iterations=iterations)
        require_one_of(get_args(Variant), variant=variant)
        require_one_of(get_args(Reward), kind=kind)
        self.areas = tuple(areas)
        self.options: dict[str, Any] = {
            "variant": variant,
            "perturbing": perturbing,
            "kind": kind,
            "iterations": iterations,
            "step": step,
            "sigma": sigma,
            "levels": levels,
            "blur": blur,
            "jitter": jitter,
            "smoothing": smoothing,
            "area_weight": area_weight,
            "smooth": smooth,
        }

    def explain(
        self, model: nn.Module, inputs: Mapping[str, Any], target: Int[Tensor, "batch"] | None = None
    ) -> Attribution:
        """Explain pixels, row by row; see `Explainer.explain`."""
        found = self.masks(model, inputs, target)
        scores = torch.stack([one.masks.mean(0).flatten() for one in found])
        with torch.no_grad():
            targets = chosen(class_scores(model, inputs)(inputs[image_in(inputs)]), target)
        return Attribution(scores, torch.ones_like(scores, dtype=torch.bool), "pixels", targets)

    def masks(
        self, model: nn.Module, inputs: Mapping[str, Any], target: Int[Tensor, "batch"] | None = None
    ) -> list[ExtremalMasks]:
        """The masks of each image, with areas, history, and what they keep.

        Raises:
            InputError: before any long work, where model or inputs are not what can be explained.
        """
        require_eval(model)
        images = inputs[image_in(inputs)]
        with torch.no_grad():
            targets = chosen(class_scores(model, inputs)(images), target)
        return [
            extremal_masks(class_scores(model, inputs, n), image, int(targets[n]), self.areas, **self.options)
            for n, image in enumerate(images)
        ]


@dataclass(frozen=True, eq=False)
class ChannelMasks:
    """Which channels of an inner layer suffice.

    Attributes:
        masks: what is kept of each channel; one row of items per image, or one for all.
        areas: shares that were asked for.
        history: reward and area term, iteration by iteration.
    """

    masks: Float[Tensor, "items areas channels"]
    areas: tuple[float, ...]
    history: Float[Tensor, "items areas 2 iterations"]

    def top(self, k: int) -> Int[Tensor, "k"]:
        """The channels that are kept most, summed over items and areas."""
        return self.masks.sum((0, 1)).topk(k).indices


def extremal_channels(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layer: str,
    target: Int[Tensor, "batch"] | None = None,
    areas: Sequence[float] = (0.1,),
    *,
    together: bool = False,
    kind: Reward = "simple",
    iterations: int = ITERATIONS,
    area_weight: float = AREA_WEIGHT,
) -> ChannelMasks:
    """The share of a layer's channels that keeps the score highest when all others are faded out.

    As `extremal_masks`, with a mask per channel that multiplies it, and the ranked area of the mask itself. The search
    begins at one half: channels that are all 1 have no rank, and which of them the area term lowers first would be chance.

    Args:
        model: in eval mode.
        inputs: of its forward, with images.
        layer: path of the module whose output `[batch, channels, ...]` is masked.
        target: classes, the model's own choice by default.
        areas: shares of the channels.
        together: one mask for all images, by the sum of their rewards; else one per image.
        kind, iterations, area_weight: as of `extremal_masks`.

    Note:
        Written from memory of the paper; the authors' code does not have it.
    """
    require_eval(model)
    require_areas(areas)
    name = image_in(inputs)
    images = inputs[name]
    with torch.no_grad(), passing(model, {layer: None}) as seen:
        targets = chosen(class_scores(model, inputs)(images), target)
    channels = seen[layer].gave.shape[1]

    def search(items: list[int]) -> tuple[Tensor, Tensor]:
        def rewards(mask: Tensor, _iteration: int) -> Float[Tensor, "areas"]:
            total = torch.zeros(len(mask), dtype=mask.dtype, device=mask.device)
            for n in items:
                with passing(model, {layer: lambda a: a * mask.view(*mask.shape, *(1,) * (a.dim() - 2))}):
                    found = class_scores(model, inputs, n)(images[n : n + 1].expand(len(mask), *images.shape[1:]))
                total = total + reward(found, int(targets[n]), kind)
            return total

        start = torch.full((len(areas), channels), 0.5, dtype=images.dtype, device=images.device)
        return ascend(lambda p: (p, p), rewards, start, areas, iterations, area_weight=area_weight)

    groups = [list(range(len(images)))] if together else [[n] for n in range(len(images))]
    masks, histories = zip(*map(search, groups), strict=True)
    return ChannelMasks(torch.stack(masks), tuple(areas), torch.stack(histories))


def inverted(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layer: str,
    mask: Float[Tensor, "channels"],
    iterations: int = 200,
    variation: float = 1e-3,
    seed: int = 0,
) -> Float[Tensor, "batch channels_in height width"]:
    """Images that give a layer what is left of its channels under a mask, to look at.

    `min_x mean((a(x) - m a(x_0))^2) / mean((m a(x_0))^2) + variation TV(x)`, by Adam from noise.

    Args:
        model: in eval mode.
        inputs: of its forward, with the images `x_0`.
        layer: path of the masked module.
        mask: what is kept of each channel.
        iterations: of Adam.
        variation: weight of the mean absolute difference between neighbours.
        seed: of the noise.

    Note:
        Written from memory of the paper; the authors' code does not have it.
    """
    require_eval(model)
    require_at_least(1, iterations=iterations)
    name = image_in(inputs)
    images = inputs[name]

    def activations(x: Tensor) -> Tensor:
        with passing(model, {layer: None}) as seen:
            scored(model(**{**inputs, name: x}))
        return seen[layer].gave

    with torch.no_grad():
        whole = activations(images)
        if mask.shape != whole.shape[1:2]:
            raise InputError(
                f"mask: expected one value per channel of {layer!r}, {whole.shape[1]}, got {list(mask.shape)}"
            )
        wanted = whole * mask.to(whole).view(1, -1, *(1,) * (whole.dim() - 2))
    scale = (wanted**2).mean().clamp(min=torch.finfo(wanted.dtype).tiny)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    x = (images.mean() + 0.1 * images.std() * noise.to(images)).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=INVERSION_RATE)
    for _ in range(iterations):
        with torch.enable_grad():
            rough = x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
            loss = ((activations(x) - wanted) ** 2).mean() / scale + variation * rough
        (x.grad,) = torch.autograd.grad(loss, x)
        optimiser.step()
    return x.detach()
