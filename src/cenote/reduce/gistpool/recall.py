"""What is still known of a text behind a compressed context, and at what cost: facts planted in prose, asked for one by one."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.answers import Answered
from cenote.core.planted import FactPrompts, recalled
from cenote.reduce.gistpool.compressors import Compressor


class Recall(NamedTuple):
    """Of one text.

    Attributes:
        facts: of each fact whether its number is told, how likely it is, and what is told in its place;
            `facts.agrees(whole.facts)` compares with another way to read the same text.
        tokens: of the text.
        slots: keys per head and block that are left of it.
        bytes: of keys and values, all blocks.
        seconds: of compressing, on the clock.
    """

    facts: Answered
    tokens: int
    slots: int
    bytes: int
    seconds: float


def kept(found: float, whole: float, none: float) -> float:
    """How much of what a context is worth is kept: 1 as with the whole context, 0 as with none; of accuracies or of `-log p`.

    Raises:
        InputError: where the context is worth nothing, so that no share of it can be told.

    >>> kept(found=0.5, whole=1.0, none=0.0)
    0.5
    """
    if whole == none:
        raise InputError(f"whole, none: are both {whole}; where the context is worth nothing, no share of it is kept")
    return (found - none) / (whole - none)


@torch.no_grad()
def recall(compressor: Compressor, model: nn.Module, asked: FactPrompts) -> Recall:
    """Read a text once, compressed, and ask for all of its facts.

    Args:
        compressor: in eval mode.
        model: its decoder.
        asked: the text and its questions, from `cenote.core.planted.prompts`.
    """
    device = next(model.parameters()).device
    begun = time.perf_counter()
    left = compressor.compress(model, asked.context.to(device))
    seconds = time.perf_counter() - begun

    def tell(
        context: Int[Tensor, "1 tokens"],  # noqa: ARG001
        prompt: Int[Tensor, "facts words"],
        mask: Bool[Tensor, "facts words"],
    ) -> Float[Tensor, "facts words vocab"]:
        same = torch.zeros(len(prompt), dtype=torch.long, device=device)
        return compressor.answer(model, prompt.to(device), left.of(same), mask.to(device)).cpu()

    facts = recalled(tell, asked)
    return Recall(facts, asked.context.shape[1], left.mask.shape[1], left.bytes, seconds)
