"""Training of compressors: the loss of answers behind compressed contexts, end to end through keys and values.

Source: Petrov, Sandler, Zhmoginov, Miller, Vladymyrov, "Long Context In-Context Compression by Getting to the Gist of Gisting"
(2025), arXiv 2504.08934. Distillation from the whole context is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.answers import UNASKED, Answered, answer_loss, answered
from cenote.core.requirements import require_at_least, require_positive
from cenote.reduce.gistpool.compressors import Compressor, FullContext


class AskedContexts(NamedTuple):
    """Contexts, prompts with their answers, and which tokens are answers.

    Attributes:
        context: `[batch, tokens]`.
        prompt: with the answer in it, `[batch, words]`.
        labels: of each word of an answer its number, else `UNASKED`, `[batch, words]`.
        context_mask, prompt_mask: True on real tokens; None for all.
    """

    context: Int[Tensor, "batch tokens"]
    prompt: Int[Tensor, "batch words"]
    labels: Int[Tensor, "batch words"]
    context_mask: Bool[Tensor, "batch tokens"] | None = None
    prompt_mask: Bool[Tensor, "batch words"] | None = None


def distance(
    logits: Float[Tensor, "batch words vocab"],
    teacher: Float[Tensor, "batch words vocab"],
    labels: Int[Tensor, "batch words"],
) -> Float[Tensor, ""]:
    """Mean Kullback-Leibler divergence from a teacher, where answers are told."""
    where = labels[:, 1:] != UNASKED
    ours, theirs = (x[:, :-1][where].float().log_softmax(-1) for x in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def train_compressor(
    compressor: Compressor,
    model: nn.Module,
    draw: Callable[[], AskedContexts],
    *,
    steps: int,
    lr: float = 1e-3,
    distilled: float = 0.0,
    clip: float = 1.0,
) -> list[float]:
    """Train a compressor's weights and gists together; the rate falls to zero along a cosine.

    Args:
        compressor: whose parameters are trained.
        model: its decoder, which stays as it is.
        draw: gives the batch of a step.
        steps: how many.
        lr: first learning rate.
        distilled: weight of the divergence from the model behind the whole context, beside the loss of answers.
        clip: largest norm of the gradient.

    Returns:
        The loss of answers, step by step.

    Raises:
        InputError: where the compressor has nothing to train.
    """
    require_at_least(1, steps=steps)
    require_positive(lr=lr, clip=clip)
    require_at_least(0, distilled=distilled)
    trained = [p for p in compressor.parameters() if p.requires_grad]
    if not trained:
        raise InputError("compressor: has no parameters to train; make it with adapt")
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    teacher = FullContext(model, adapt=None) if distilled else None
    losses = []
    compressor.train()
    for _ in range(steps):
        asked = draw()
        logits = compressor(model, asked.context, asked.prompt, asked.context_mask, asked.prompt_mask)
        loss = whole = answer_loss(logits, asked.labels)
        if teacher is not None:
            with torch.no_grad():
                goal = teacher(model, asked.context, asked.prompt, asked.context_mask, asked.prompt_mask)
            whole = loss + distilled * distance(logits, goal, asked.labels)
        optimiser.zero_grad()
        whole.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    compressor.eval()
    return losses


@torch.no_grad()
def told(compressor: Compressor, model: nn.Module, asked: AskedContexts) -> Answered:
    """Which answers are told behind compressed contexts, and how likely each is."""
    logits = compressor(model, asked.context, asked.prompt, asked.context_mask, asked.prompt_mask)
    return answered(logits, asked.labels)
