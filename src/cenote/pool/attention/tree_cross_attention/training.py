from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.pool.attention.tree_cross_attention.objective import TreeObjective
from cenote.pool.attention.tree_cross_attention.retreever import ReTreever
from cenote.pool.training import History, cosine_schedule, train_steps


class Asked(NamedTuple):
    """Contexts, what is asked of each, and the answers.

    Attributes:
        context: `[batch, tokens, context_dim]`.
        queries: `[batch, queries, query_dim]`.
        target: `[batch, queries]` class numbers, or `[batch, queries, width]`.
        mask: `[batch, tokens]`, True on real tokens.
    """

    context: Float[Tensor, "batch tokens context_dim"]
    queries: Float[Tensor, "batch queries query_dim"]
    target: Shaped[Tensor, "batch queries *target"]
    mask: Bool[Tensor, "batch tokens"] | None = None


def train_retreever(
    model: ReTreever,
    objective: TreeObjective,
    draw: Callable[[], Asked],
    *,
    steps: int = 100_000,
    lr: float = 5e-4,
    clip: float | None = 1.0,
    score: Callable[[], float] | None = None,
    score_every: int = 10,
) -> History:
    """The authors' recipe: Adam whose rate falls along a cosine, gradients of length 1 at most, each batch drawn anew.

    Args:
        model: what is trained; in eval mode afterwards.
        objective: prediction, full attention, and the reward of the ways.
        draw: gives a batch, of 128 contexts in the paper.
        steps: of the training.
        lr: of the first step.
        clip: largest norm of the gradient.
        score: of the model on other contexts, accuracy say; the best state is kept.
        score_every: hundreds of steps between two scores.

    Returns:
        How it went; one mean loss for each hundred steps.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = ReTreever(18, 8, out_dim=10, dim=16, encoder_layers=1)
        >>> history = train_retreever(
        ...     model, TreeObjective("classification"), lambda: mirrored_copy(8, batch=16), steps=2, lr=5e-3
        ... )
        >>> len(history.losses)
        1

    Source: Feng, Tung, Hajimirsadeghi, Bengio, Ahmed, "Tree Cross Attention", ICLR 2024.
    """
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    return train_steps(
        model,
        draw,
        lambda asked: objective(model, *asked).total,
        adam,
        steps=steps,
        clip=clip,
        schedule=cosine_schedule(adam, steps),
        score=score,
        score_every=score_every,
    )


def mirrored_copy(length: int, batch: int, generator: torch.Generator | None = None) -> Asked:
    """The paper's copy task: of a row of digits and its mirror image the first half is read, the second asked for.

    Tokens are `[one-hot digit (10), one-hot place]`, queries one-hot places of the second half.

    Args:
        length: of both halves together, even.
        batch: how many rows.
        generator: of the draw.

    Raises:
        InputError: where the length has no two halves.

    >>> asked = mirrored_copy(6, batch=2)
    >>> digits = asked.context[..., :10].argmax(-1)
    >>> bool((asked.target == digits.flip(1)).all()), asked.context.shape, asked.queries.shape
    (True, torch.Size([2, 3, 16]), torch.Size([2, 3, 6]))

    Source: the copy task of Feng et al., "Tree Cross Attention", ICLR 2024.
    """
    require_at_least(1, batch=batch)
    if length < 2 or length % 2:
        raise InputError(f"length: expected an even number of at least 2, got {length}")
    half = length // 2
    digits = torch.randint(10, (batch, half), generator=generator)
    places = torch.eye(length)
    context = torch.cat([torch.nn.functional.one_hot(digits, 10).float(), places[:half].expand(batch, -1, -1)], -1)
    return Asked(context, places[half:].expand(batch, -1, -1), digits.flip(1))
