"""The search for an extremal mask: of pixels, or of the channels of an inner layer.

Source: Fong, Patrick and Vedaldi (2019), arXiv 1910.08485.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.explain.extremal_perturbations.masks import (
    BLUR,
    LEVELS,
    Perturbing,
    Pyramid,
    Smoothing,
    SmoothMask,
    gaussian_blur,
    ranked_area,
    require_areas,
)
from cenote.explain.images import Scores

Variant = Literal["preserve", "delete", "dual"]
Reward = Literal["simple", "contrastive"]
AreaTerm = Literal["ranked", "mean"]
Generator = Callable[[Tensor], tuple[Tensor, Tensor]]

LEARNING_RATE = 0.01
MOMENTUM = 0.9
DAMPENING = 0.9
AREA_WEIGHT = 300.0
AREA_GROWTH = 1.0035
ITERATIONS = 800


@dataclass(frozen=True, eq=False)
class ExtremalMasks:
    """The masks of one image, one per area that was asked for.

    Attributes:
        masks: what is kept of each pixel, from 0 to 1.
        areas: shares that were asked for.
        history: reward and area term, iteration by iteration.
        kept: reward of the image under the mask that came out.
        whole: reward of the image as it is.
    """

    masks: Float[Tensor, "areas 1 height width"]
    areas: tuple[float, ...]
    history: Float[Tensor, "areas 2 iterations"]
    kept: Float[Tensor, "areas"]
    whole: float

    @property
    def area(self) -> Float[Tensor, "areas"]:
        """The share of the image that each mask keeps."""
        return self.masks.flatten(1).mean(1)

    @property
    def heeded(self) -> bool:
        """Whether the score depended on the mask; where it did not, the area term alone made the masks."""
        reward = self.history[:, 0]
        return bool((reward != reward[:, :1]).any())

    def smallest(self, share: float = 0.9) -> int | None:
        """The number of the smallest area that keeps this share of what the whole image scores; `None` where none does.

        Args:
            share: of the whole image's reward, which should be above 0, as a probability or a logit that speaks for the class.
        """
        require_positive(share=share)
        enough = [n for n, kept in enumerate(self.kept.tolist()) if kept >= share * self.whole]
        return min(enough, key=lambda n: self.areas[n]) if enough else None


def reward(scores: Float[Tensor, "items classes"], target: int, kind: Reward = "simple") -> Float[Tensor, "items"]:
    """The score of the target, or by how much it leads all others.

    Args:
        scores: of each class.
        target: number of the class.
        kind: `"simple"`: `z_c`; `"contrastive"`: `z_c - max_(c' != c) z_c'`.

    >>> reward(torch.tensor([[1.0, 3.0, 2.0]]), 1, "contrastive").tolist()
    [1.0]
    """
    require_one_of(get_args(Reward), kind=kind)
    classes = scores.shape[1]
    if not 0 <= target < classes:
        raise InputError(f"target: expected a class from 0 to {classes - 1}, got {target}")
    if kind == "simple":
        return scores[:, target]
    if classes < 2:
        raise InputError("kind: a contrastive reward needs at least two classes, got 1")
    return scores[:, target] - torch.cat([scores[:, :target], scores[:, target + 1 :]], 1).amax(1)


def extremal_masks(
    scores: Scores,
    image: Float[Tensor, "channels height width"],
    target: int,
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
    area_term: AreaTerm = "ranked",
    area_weight: float = AREA_WEIGHT,
    smooth: float = 0.0,
) -> ExtremalMasks:
    """The mask of each area that keeps the score highest, or lowers it most when what it covers is taken away.

    `max_m z(x, m) - lambda_t R_a(m)`, `R_a` the `ranked_area` of the whole mask, all areas in one batch: gradient ascent from
    a mask of ones, momentum and dampening 0.9, parameters kept in [0, 1], `lambda` from 300 up by 0.35 % an iteration.

    Args:
        scores: perturbed images -> score of each class, differentiable.
        image: one image as the model takes it.
        target: number of the class.
        areas: shares of the image.
        variant: `"preserve"`: the score of what the mask keeps; `"delete"`: the negative score of the rest; `"dual"`: both.
        perturbing: how pixels are taken away, see `Pyramid`.
        kind: of the reward, see `reward`.
        iterations: of the ascent.
        step, sigma, smoothing: of the mask, see `SmoothMask`.
        levels, blur: see `Pyramid`.
        jitter: show the model mirrored images at even iterations.
        area_term: `"ranked"`, or `"mean"`: `(mean(m) - a)^2` instead, which leaves masks grey.
        area_weight: `lambda` at first.
        smooth: standard deviation in pixels of a Gaussian over the masks that come out.

    Raises:
        InputError: naming the argument.

    Warns:
        UserWarning: where the score does not depend on the mask, so that the area term alone made it.
    """
    require_one_of(get_args(Variant), variant=variant)
    masks = SmoothMask(int(image.shape[1]), int(image.shape[2]), step, sigma, smoothing).to(image.device)
    pyramid = Pyramid(image, perturbing, levels, blur)

    def rewards(mask: Tensor, mirrored: bool = False) -> Float[Tensor, "areas"]:
        shown = []
        if variant != "delete":
            shown.append(pyramid(mask))
        if variant != "preserve":
            shown.append(pyramid(1 - mask))
        batch = torch.cat(shown)
        found = reward(scores(batch.flip(-1) if mirrored else batch), target, kind)
        if variant == "preserve":
            return found
        return -found if variant == "delete" else found[: len(mask)] - found[len(mask) :]

    start = torch.ones(len(areas), 1, *masks.grid, dtype=image.dtype, device=image.device)
    mask, history = ascend(
        masks,
        lambda m, n: rewards(m, jitter and n % 2 == 0),
        start,
        areas,
        iterations,
        area_term=area_term,
        area_weight=area_weight,
    )
    mask = gaussian_blur(mask, smooth)
    with torch.no_grad():
        kept = rewards(mask)
        whole = float(rewards(torch.ones_like(mask[:1]))[0])
    found = ExtremalMasks(mask, tuple(areas), history, kept, whole)
    if iterations > 2 and not found.heeded:
        warnings.warn(
            "the score did not change with the mask: the area term alone made these masks", UserWarning, stacklevel=2
        )
    return found


def ascend(
    masks: Generator,
    rewards: Callable[[Tensor, int], Float[Tensor, "areas"]],
    start: Float[Tensor, "areas ..."],
    areas: Sequence[float],
    iterations: int,
    *,
    area_term: AreaTerm = "ranked",
    area_weight: float = AREA_WEIGHT,
) -> tuple[Float[Tensor, "areas ..."], Float[Tensor, "areas 2 iterations"]]:
    """Gradient ascent on parameters of masks; nothing else gathers a gradient.

    Args:
        masks: parameters -> the whole masks, whose area counts, and what of them acts.
        rewards: what acts, number of the iteration -> one number per area.
        start: the parameters at first.
        areas: shares, one per mask.
        iterations: how many.
        area_term, area_weight: see `extremal_masks`.

    Returns:
        The masks that act, and reward and area term of every iteration.
    """
    require_areas(areas)
    require_at_least(1, iterations=iterations)
    require_at_least(0, area_weight=area_weight)
    require_one_of(get_args(AreaTerm), area_term=area_term)
    parameters = start.detach().clone().requires_grad_()
    optimiser = torch.optim.SGD([parameters], lr=LEARNING_RATE, momentum=MOMENTUM, dampening=DAMPENING, maximize=True)
    weight, history = area_weight, []
    acting = parameters
    for n in range(iterations):
        with torch.enable_grad():
            whole, acting = masks(parameters)
            won = rewards(acting, n)
            area = ranked_area(whole, areas) if area_term == "ranked" else _mean_area(whole, areas)
            energy = (won - weight * area).sum()
        (parameters.grad,) = torch.autograd.grad(energy, parameters)
        history.append(torch.stack([won.detach(), -weight * area.detach()], 1))
        optimiser.step()
        with torch.no_grad():
            parameters.clamp_(0, 1)
        weight *= AREA_GROWTH
    return acting.detach(), torch.stack(history, 2)


def _mean_area(mask: Float[Tensor, "masks *units"], areas: Sequence[float]) -> Float[Tensor, "masks"]:
    return (mask.flatten(1).mean(1) - torch.tensor(areas).to(mask)) ** 2
