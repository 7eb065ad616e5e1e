"""Training in two stages, and what the sequence, attention and caches cost.

Source: Yan, Han, Tsai, Xue, Fang, Hong, Guo, Zhang, "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual
Cross-Attention Mechanisms" (2025), arXiv 2505.17020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core.answers import answer_loss
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.reduce.crosslmm.model import CrossLMM


class Clips(NamedTuple):
    """Frames, prompts with their answers, and which tokens are answers.

    Attributes:
        ids: with placeholders, `[batch, tokens]`.
        labels: of each token of an answer its number, else `UNASKED`.
        frames: of each item; None for text alone.
        mask, frame_mask: True on real tokens and frames; None for all.
    """

    ids: Int[Tensor, "batch tokens"]
    labels: Int[Tensor, "batch tokens"]
    frames: Float[Tensor, "batch frames *size"] | None = None
    mask: Bool[Tensor, "batch tokens"] | None = None
    frame_mask: Bool[Tensor, "batch frames"] | None = None


def training_stage(
    model: CrossLMM,
    number: int,
    *,
    text: bool | None = None,
    lr: float | None = None,
    encoder_lr: float = 2e-6,
) -> list[dict[str, Any]]:
    """Freeze and free what a stage trains, and give its groups of parameters, each with its rate.

    Stage 1 trains projector and dual layers, in which only visual tokens ask, at 1e-4; decoder and encoder are frozen. Stage 2
    trains everything, text asks too, at 1e-5, and the encoder at 2e-6.

    Args:
        model: whose parameters are meant.
        number: 1 or 2.
        text: whether text asks (T2V); from stage 2 on by default.
        lr: of all but the encoder.
        encoder_lr: in stage 2.

    Note: what is frozen in stage 1 is inferred.
    """
    require_one_of((1, 2), number=number)
    text = number == 2 if text is None else text
    lr = (1e-4 if number == 1 else 1e-5) if lr is None else lr
    model.requires_grad_(number == 2)
    model.projector.requires_grad_(True)
    model.layers.requires_grad_(True)
    for layer in model.layers.values():
        layer.text_on = text  # type: ignore[assignment]
        if not text and layer.t2v is not None and layer.t2v is not layer.v2v:
            layer.t2v.requires_grad_(False)
    eyes = list(model.encoder.parameters()) if isinstance(model.encoder, nn.Module) else []
    apart = {id(p) for p in eyes}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr}]
    if number == 2 and eyes:
        groups.append({"params": eyes, "lr": encoder_lr})
    return groups


def train_crosslmm(
    model: CrossLMM, draw: Callable[[], Clips], groups: list[dict[str, Any]], *, steps: int, clip: float = 1.0
) -> list[float]:
    """Train what a stage trains, on the next tokens of answers; rates fall to zero along a cosine.

    Args:
        model: in training mode meanwhile.
        draw: gives the batch of a step.
        groups: of parameters, from `training_stage`.
        steps: how many.
        clip: largest norm of the gradient.

    Returns:
        The loss, step by step.
    """
    require_at_least(1, steps=steps)
    require_positive(clip=clip)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    trained = [p for group in groups for p in group["params"]]
    losses = []
    model.train()
    for _ in range(steps):
        clips = draw()
        loss = answer_loss(model(clips.ids, clips.frames, clips.mask, clips.frame_mask), clips.labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


class Cost(NamedTuple):
    """Multiply-adds of attention's two products, all blocks, and numbers in caches.

    Attributes:
        sequence: tokens in the decoder's sequence.
        own: of self-attention over these.
        cross: of dual layers, each over all original tokens.
        cached: keys and values of the sequence, and of the original tokens in each dual layer, V2V's and T2V's.
    """

    sequence: int
    own: int
    cross: int
    cached: int

    @property
    def products(self) -> int:
        """Of self-attention and dual layers."""
        return self.own + self.cross


def cost(
    frames: int,
    tokens: int,
    text: int,
    *,
    side: int,
    dim: int,
    blocks: int,
    every: int | None = 4,
    kv_dim: int | None = None,
) -> Cost:
    """What a video costs, by counting; against all tokens in the sequence: `side^2 = tokens`, `every=None`.

    Args:
        frames: how many.
        tokens: of a frame, from the encoder.
        text: tokens of the text.
        side: of the merged grid of a frame.
        dim: of the decoder.
        blocks: of the decoder.
        every: blocks from one dual layer to the next; None: no dual layers.
        kv_dim: width of all key heads together; `dim` by default.

    >>> cost(2, 4, 3, side=1, dim=8, blocks=2, every=2)
    Cost(sequence=5, own=800, cross=640, cached=416)
    """
    require_at_least(1, frames=frames, tokens=tokens, side=side, dim=dim, blocks=blocks)
    require_at_least(0, text=text)
    sequence, originals = text + frames * side**2, frames * tokens
    layers = 0 if every is None else -(-blocks // every)
    return Cost(
        sequence,
        own=2 * sequence**2 * dim * blocks,
        cross=2 * sequence * originals * dim * layers,
        cached=2 * sequence * (dim if kv_dim is None else kv_dim) * blocks + 4 * originals * dim * layers,
    )
