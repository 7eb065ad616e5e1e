"""Training with the choice drawn, from labels of classes and, where there are any, maps of objects.

Source: Zhang, Li, Seo and Cao (2024), arXiv 2410.23608.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.reduce.select_and_pack.backbone import SPT


class Trained(NamedTuple):
    """Step by step: the loss of the task, the loss of the scores (0 without maps), and the share of tokens that were kept."""

    losses: tuple[float, ...]
    selection_losses: tuple[float, ...]
    kept: tuple[float, ...]


def spt_loss(task: Float[Tensor, ""], selection: Float[Tensor, ""] | None, alpha: float = 1.0) -> Float[Tensor, ""]:
    """`L = L_task + alpha L_select`; without labels, the task's alone. The published alpha is not known.

    >>> float(spt_loss(torch.tensor(1.0), torch.tensor(2.0), alpha=0.5))
    2.0
    """
    require_at_least(0, alpha=alpha)
    return task if selection is None else task + alpha * selection


def train_spt(
    model: SPT,
    images: Float[Tensor, "items channels height width"],
    labels: Bool[Tensor, "items classes"],
    masks: Bool[Tensor, "items height width"] | None = None,
    *,
    alpha: float = 1.0,
    epochs: int = 10,
    batch: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    random_state: int = 0,
) -> Trained:
    """Train to name the classes that are present, end to end; AdamW, its rate falling along a cosine.

    Args:
        model: trained in place, left in eval mode.
        images, labels: which classes each image shows.
        masks: pixels of objects; without them the gate learns from the task alone.
        alpha: weight of the loss of the scores.
        epochs, batch, lr, weight_decay: of the optimiser.
        random_state: of the order and the draws.
    """
    require_at_least(1, epochs=epochs, batch=batch)
    require_positive(lr=lr)
    if len(labels) != len(images):
        raise InputError(f"labels: expected {len(images)} as images, got {len(labels)}")
    stepper = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, epochs * -(-len(images) // batch))
    generator = torch.Generator().manual_seed(random_state)
    found: list[tuple[float, float, float]] = []
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=generator).split(batch):
                seen = model(images[chosen], None if masks is None else masks[chosen])
                task = F.binary_cross_entropy_with_logits(seen.logits, labels[chosen].to(seen.logits))
                stepper.zero_grad(set_to_none=True)
                spt_loss(task, seen.selection_loss, alpha).backward()
                stepper.step()
                schedule.step()
                selection = 0.0 if seen.selection_loss is None else float(seen.selection_loss.detach())
                kept = torch.cat([k.flatten() for k in seen.keeps]).double().mean() if seen.keeps else torch.ones(())
                found.append((float(task.detach()), selection, float(kept)))
    model.eval()
    return Trained(*map(tuple, zip(*found, strict=True)))
