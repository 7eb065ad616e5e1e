"""How the model is trained, and evaluated: bits per character, with as much context behind every target.

Source: Nawrot et al. (2023), arXiv 2211.09761.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.reduce.dynamic_token_pooling.model import HourglassLM, objective
from cenote.reduce.dynamic_token_pooling.text import chunks


class Trained(NamedTuple):
    """Step by step: mean loss of the targets in nats, loss of the boundaries, share of tokens that were cuts."""

    losses: tuple[float, ...]
    boundary_losses: tuple[float, ...]
    rates: tuple[float, ...]


class Evaluated(NamedTuple):
    """Of a text.

    Attributes:
        bits_per_character: of the targets.
        targets: how many there were.
        boundary_rate: share of the targets that were cuts.
        shortening: targets per cut; infinite without one.
    """

    bits_per_character: float
    targets: int
    boundary_rate: float
    shortening: float


def train_hourglass(
    model: HourglassLM,
    text: Int[Tensor, "characters"],
    boundaries: Bool[Tensor, "characters"] | None = None,
    *,
    steps: int = 200_000,
    batch: int = 8,
    length: int = 2048,
    lr: float = 2.5e-4,
    warm_up: int = 4000,
    clip: float = 0.25,
    random_state: int = 0,
) -> Trained:
    """Train by Adam, its rate rising in a line and falling along a cosine; chunks come in a fresh order in every pass.

    Args:
        model: trained in place, left in eval mode.
        text: tokens.
        boundaries: of the text, for models that are given them.
        steps, batch, length: of chunks of the text.
        lr: highest rate.
        warm_up: steps in which it rises.
        clip: largest norm of the gradient.
        random_state: of order, dropout and Gumbel noise.
    """
    require_at_least(1, steps=steps, batch=batch)
    require_at_least(0, warm_up=warm_up)
    require_positive(lr=lr, clip=clip)
    if boundaries is not None and boundaries.shape != text.shape:
        raise InputError(f"boundaries: expected {len(text)} as the text, got {list(boundaries.shape)}")
    data, target, start = chunks(text, length)
    cuts = None if boundaries is None else boundaries[start[:, None] + torch.arange(length)]
    stepper = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: rate(step, steps, warm_up))
    generator = torch.Generator().manual_seed(random_state)
    found: list[tuple[float, float, float]] = []
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(random_state)
        for _, chosen in zip(range(steps), _orders(len(data), batch, generator), strict=False):
            read = model(data[chosen], target[chosen], None if cuts is None else cuts[chosen])
            stepper.zero_grad(set_to_none=True)
            objective(read).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            stepper.step()
            schedule.step()
            assert read.losses is not None
            parts = (read.losses.mean(), read.boundary_loss, read.boundaries.mean())
            found.append(tuple(float(part.detach()) for part in parts))  # type: ignore[arg-type]
    model.eval()
    return Trained(*map(tuple, zip(*found, strict=True)))


def rate(step: int, steps: int, warm_up: int) -> float:
    """Factor on the learning rate: up to 1 in a line, then down to 0 along a cosine.

    >>> rate(1, 10, 2), rate(2, 10, 2), round(rate(6, 10, 2), 6)
    (0.5, 1.0, 0.5)
    """
    if step < warm_up:
        return step / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def evaluate_hourglass(
    model: HourglassLM,
    text: Int[Tensor, "characters"],
    boundaries: Bool[Tensor, "characters"] | None = None,
    *,
    context: int = 2048,
    target: int = 512,
    batch: int = 8,
) -> Evaluated:
    """Bits per character of all tokens but the first; each is predicted once, from the `context` that ends before it.

    Args:
        model: in eval mode.
        text: tokens.
        boundaries: of the text, for models that are given them.
        context: longest piece that is read.
        target: how many at its end are predicted; those of the beginning are read with what there is.
        batch: pieces at once.
    """
    require_at_least(1, target=target, batch=batch)
    if context < target:
        raise InputError(f"context: expected at least target={target}, got {context}")
    if len(text) < 2:
        raise InputError(f"text: expected at least two tokens, got {len(text)}")
    if model.training:
        raise InputError("model: expected one in eval mode, got one in training; call model.eval()")
    nats, cuts, count = 0.0, 0.0, len(text) - 1
    for pieces in _windows(len(text), context, target, batch):
        rows = torch.stack([torch.arange(begin, end) for begin, end, _ in pieces])
        last = pieces[0][2]
        read = model(text[rows], text[rows[:, -last:] + 1], None if boundaries is None else boundaries[rows])
        assert read.losses is not None
        nats += float(read.losses.double().sum())
        cuts += float(read.boundaries[:, -last:].double().sum())
    return Evaluated(nats / math.log(2) / count, count, cuts / count, count / cuts if cuts else math.inf)


def _windows(tokens: int, context: int, target: int, batch: int) -> Iterator[list[tuple[int, int, int]]]:
    """Begin, end and number of targets of pieces, those of one shape together."""
    group: list[tuple[int, int, int]] = []
    for start in range(0, tokens - 1, target):
        last = min(target, tokens - 1 - start)
        piece = (max(0, start - (context - target)), start + last, last)
        same = bool(group) and (group[0][1] - group[0][0], group[0][2]) == (piece[1] - piece[0], last)
        if group and (not same or len(group) == batch):
            yield group
            group = []
        group.append(piece)
    yield group


def _orders(items: int, batch: int, generator: torch.Generator) -> Iterator[Int[Tensor, "chosen"]]:
    while True:
        order = torch.randperm(items, generator=generator)
        whole = order.split(batch)
        # a last batch that is not full is left out, unless there is no other
        yield from whole[:-1] if len(whole) > 1 and len(whole[-1]) < batch else whole
