"""Training with reduction on: gradients go through merged means, choices of numbers have none."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.requirements import require_at_least, require_positive
from cenote.reduce.reducible_vit.model import ReducesTokens, ReducibleViT

LOWEST = 1e-6


def train_reduced(
    vit: ReducibleViT,
    images: Float[Tensor, "items channels height width"],
    labels: Int[Tensor, "items"],
    at: Mapping[int, ReducesTokens] | None = None,
    *,
    epochs: int,
    learning_rate: float,
    warm_up: int = 0,
    batch: int = 128,
    weight_decay: float = 0.05,
    seed: int = 0,
) -> list[float]:
    """Train a network, from scratch or from a trained one, with reducers in their blocks: AdamW on cross-entropy, the learning
    rate along a cosine to `1e-6`, after a rise from there.

    Args:
        vit: trained in place, and left in eval mode.
        images: of one size.
        labels: their classes.
        at: what reduces, by block; None trains the plain network.
        epochs: passes over the images: 30 of fine-tuning and 300 from scratch are published.
        learning_rate: the largest: 1e-5 for fine-tuning a DeiT-S, 2e-3 from scratch with 2,048 images at a time.
        warm_up: epochs in which it rises from 1e-6: 5 from scratch.
        batch: images of a step.
        weight_decay: of AdamW.
        seed: of the order of images.

    Returns:
        The loss of each step.

    Source:
        Wu et al. 2023, arXiv 2310.01812; Long et al. 2023, arXiv 2211.11315; Touvron et al. 2021, arXiv 2012.12877.
    """
    require_at_least(1, epochs=epochs, batch=batch)
    require_at_least(0, warm_up=warm_up)
    require_positive(learning_rate=learning_rate)
    stepper = torch.optim.AdamW(vit.parameters(), lr=learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(labels) / batch)
    losses = []
    vit.train()
    for epoch in range(epochs):
        for step, chosen in enumerate(torch.randperm(len(labels), generator=generator).split(batch)):
            done = epoch + step / per_epoch
            for group in stepper.param_groups:
                group["lr"] = rate_at(done, epochs, learning_rate, warm_up)
            loss = F.cross_entropy(vit(images[chosen], at), labels[chosen])
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            losses.append(float(loss.detach()))
    vit.eval()
    return losses


def rate_at(epoch: float, epochs: int, peak: float, warm_up: int = 0) -> float:
    """The learning rate: from 1e-6 to its peak in the first epochs, then along a cosine back.

    >>> [round(rate_at(e, 300, 2e-3, 5), 6) for e in (0, 2.5, 5, 152.5, 300)]
    [1e-06, 0.001, 0.002, 0.001, 1e-06]
    """
    if epoch < warm_up:
        return LOWEST + (peak - LOWEST) * epoch / warm_up
    share = (epoch - warm_up) / max(epochs - warm_up, 1)
    return LOWEST + (peak - LOWEST) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
