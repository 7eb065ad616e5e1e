"""How networks of images are trained: AdamW, a cosine, and what is done to images on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.mix.augment import erased, mixed_pairs, rand_augment, smoothed
from cenote.mix.fitting import in_training


@dataclass(frozen=True)
class Recipe:
    """What a paper trained with.

    Attributes:
        epochs: passes over the images.
        learning_rate: the largest, for `per` images at a time; it grows with the batch.
        per: so many.
        weight_decay: of matrices and kernels.
        warm_up: epochs in which the rate rises.
        smoothing: of labels.
        mixup, cutmix: as of `mixed_pairs`.
        magnitude: as of `rand_augment`; 0 for none.
        erasing: probability that a part of an image is erased.
        averaged: weight of the past in a running mean of the parameters; 0 for none.
    """

    epochs: int = 300
    learning_rate: float = 1e-3
    per: int = 1024
    weight_decay: float = 0.05
    warm_up: int = 5
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    magnitude: float = 9
    erasing: float = 0.25
    averaged: float = 0.0


PLAIN = Recipe(
    epochs=25, learning_rate=3e-3, per=64, warm_up=2, smoothing=0.0, mixup=0.0, cutmix=0.0, magnitude=0, erasing=0.0
)
"""For small sets and few minutes."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Of a network, images and targets `[batch, classes]`."""


class Trained(NamedTuple):
    """What came of it.

    Attributes:
        losses: of each step.
        averaged: the network with the running means of the parameters, where the recipe has one.
    """

    losses: list[float]
    averaged: nn.Module | None


def cross_entropy(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Of a network that gives logits."""
    return F.cross_entropy(net(images), targets)


def train_images(
    net: nn.Module,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    recipe: Recipe = PLAIN,
    *,
    batch: int = 64,
    classes: int | None = None,
    loss: Loss = cross_entropy,
    clip: float | None = None,
    seed: int = 0,
) -> Trained:
    """Train a classifier of images by AdamW, the rate rising in a line and falling along a cosine.

    Args:
        net: trained in place, left in eval mode.
        images: values near 0 to 1.
        labels: their classes.
        recipe: what a paper trained with; the published ones need many images.
        batch: images of a step.
        classes: their number; default: the largest label and one.
        loss: of a batch; default: cross-entropy of the logits.
        clip: largest norm of the gradient, None for any.
        seed: of orders, of what is done to images, and of dropout.

    Raises:
        InputError: where numbers of images and labels differ.
    """
    if len(images) != len(labels):
        raise InputError(f"labels: expected one for each of {len(images)} images, got {len(labels)}")
    require_at_least(1, items=len(labels), batch=batch, epochs=recipe.epochs)
    require_positive(learning_rate=recipe.learning_rate)
    classes = int(labels.max()) + 1 if classes is None else classes
    stepper = torch.optim.AdamW(decayed(net, recipe.weight_decay), lr=recipe.learning_rate * batch / recipe.per)
    per_epoch = math.ceil(len(labels) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        stepper, lambda step: rate(step, recipe.epochs * per_epoch, recipe.warm_up * per_epoch)
    )
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(recipe.averaged)) if recipe.averaged else None
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with in_training(net), torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(recipe.epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(batch):
                x, targets = _augmented(images[chosen], labels[chosen], classes, recipe, generator)
                found = loss(net, x, targets)
                stepper.zero_grad(set_to_none=True)
                found.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                stepper.step()
                schedule.step()
                losses.append(float(found.detach()))
                if averaged is not None:
                    averaged.update_parameters(net)
    mean = None if averaged is None else copy.deepcopy(averaged.module).eval()
    return Trained(losses, mean)


def decayed(net: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameters for an optimiser: vectors and numbers, as factors and biases are, are not shrunk."""
    matrices = [p for p in net.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in net.parameters() if p.requires_grad and p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def rate(step: int, steps: int, warm_up: int) -> float:
    """Factor on the learning rate: up to 1 in a line, then down to 0 along a cosine.

    >>> rate(0, 10, 2), rate(2, 10, 2), round(rate(6, 10, 2), 6)
    (0.5, 1.0, 0.5)
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


@torch.no_grad()
def accuracy(
    net: nn.Module,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    batch: int = 256,
) -> float:
    """Share of images whose largest logit is that of their label."""
    right = [net(x).argmax(-1) == y for x, y in zip(images.split(batch), labels.split(batch), strict=True)]
    return float(torch.cat(right).float().mean())


def _augmented(
    x: Tensor, labels: Tensor, classes: int, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if recipe.magnitude:
        x = rand_augment(x, recipe.magnitude, generator)
    if recipe.erasing:
        x = erased(x, recipe.erasing, generator)
    return mixed_pairs(x, smoothed(labels, classes, recipe.smoothing).to(x), recipe.mixup, recipe.cutmix, generator)
