"""Answers that a decoder tells token by token: their loss, how likely each is, and which are right."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import InputError

UNASKED = -100
"""The label of a token that is no answer."""


class Answered(NamedTuple):
    """Of each item.

    Attributes:
        right: whether every token of the answer was the likeliest, behind the true ones before it.
        nll: `-log p` of the answer, summed over its tokens.
        said: the likeliest token in the place of each word of an answer, else `UNASKED`, `[batch, words]`.
    """

    right: Bool[Tensor, "batch"]
    nll: Float[Tensor, "batch"]
    said: Int[Tensor, "batch words"]

    def agrees(self, other: Answered) -> Bool[Tensor, "batch"]:
        """Which answers are the same, word by word, right or wrong."""
        return (self.said == other.said).all(1)


def answer_loss(logits: Float[Tensor, "batch words vocab"], labels: Int[Tensor, "batch words"]) -> Float[Tensor, ""]:
    """Mean of `-log p` over the tokens of answers, each told by the token before it.

    Args:
        logits: of a causal decoder.
        labels: of each word of an answer its number, else `UNASKED`.

    Raises:
        InputError: where there is no answer behind a first token.

    Example:
        >>> labels = torch.tensor([[UNASKED, UNASKED, 3]])
        >>> round(float(answer_loss(torch.zeros(1, 3, 4), labels)), 4)
        1.3863
    """
    if not bool((labels[:, 1:] != UNASKED).any()):
        raise InputError(
            "labels: no token behind a first one is an answer; mark what is asked for, the rest is UNASKED"
        )
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=UNASKED)


def answered(logits: Float[Tensor, "batch words vocab"], labels: Int[Tensor, "batch words"]) -> Answered:
    """Which answers a decoder tells, and how likely it finds them.

    Example:
        >>> logits = torch.tensor([[[0.0, 9.0], [0.0, 0.0]]])
        >>> answered(logits, torch.tensor([[UNASKED, 1]])).right.tolist()
        [True]
    """
    gold = labels[:, 1:]
    asked = gold != UNASKED
    ahead = logits[:, :-1].float()
    each = ahead.log_softmax(-1).gather(-1, gold.clamp(min=0)[..., None])[..., 0].masked_fill(~asked, 0.0)
    said = ahead.argmax(-1).masked_fill(~asked, UNASKED)
    return Answered((said == gold).all(1), -each.sum(1), F.pad(said, (1, 0), value=UNASKED))
