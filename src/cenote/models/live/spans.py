"""Where the image, the question, item k lie among the tokens: bool masks `[batch, tokens]`.

Made of what the model is given, after templating and padding on either side, and never of counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_several

Range = tuple[int, int]


def of_characters(
    offsets: Int[Tensor, "batch tokens 2"], ranges: Sequence[Sequence[Range]]
) -> Bool[Tensor, "batch tokens"]:
    """Tokens that share a character with one of the item's ranges.

    Args:
        offsets: first character of each token and the one after its last, as a fast tokenizer gives them
            (`return_offsets_mapping=True`); equal for tokens of no character (padding, special tokens).
        ranges: for each item of the batch, (first, one after the last) in the templated text.

    Raises:
        InputError: where an item is missing, or a range holds no token.

    Example:
        >>> offsets = torch.tensor([[[0, 0], [0, 3], [4, 7], [8, 12]]])
        >>> of_characters(offsets, [[(4, 12)]])
        tensor([[False, False,  True,  True]])
    """
    if len(ranges) != len(offsets):
        raise InputError(f"ranges: of {len(ranges)} items, and offsets of {len(offsets)}")
    first, behind = offsets[..., 0], offsets[..., 1]
    mask = torch.zeros(offsets.shape[:2], dtype=torch.bool, device=offsets.device)
    for item, parts in enumerate(ranges):
        for start, end in parts:
            inside = (first[item] < end) & (behind[item] > start) & (behind[item] > first[item])
            if not inside.any():
                raise InputError(
                    f"ranges: no token of item {item} lies in characters {start} to {end}; was the text cut?"
                )
            mask[item] |= inside
    return mask


def of_texts(
    tokenizer: Any, texts: Sequence[str], parts: Mapping[str, Sequence[str]], **options: Any
) -> tuple[dict[str, Tensor], dict[str, Bool[Tensor, "batch tokens"]]]:
    """Tokenize texts as the model gets them, and find parts of them.

    Args:
        tokenizer: a fast tokenizer of transformers.
        texts: after the chat template.
        parts: for each span's name the part of each text, which must occur in it once.
        options: of the tokenizer, such as `add_special_tokens=False` for text whose template already has them.

    Returns:
        Inputs of the model, and the spans.

    Raises:
        InputError: where a part doesn't occur, or more than once; for a tokenizer without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} gives no offsets of characters; load it with use_fast=True"
        )
    require_several(texts=texts)
    ranges: dict[str, list[list[Range]]] = {}
    for name, found in parts.items():
        require_several(parts=found)
        if len(found) != len(texts):
            raise InputError(f"parts: {name!r} is of {len(found)} items, and there are {len(texts)} texts")
        ranges[name] = [[_found(text, part, name)] for text, part in zip(texts, found, strict=True)]
    padding = len(texts) > 1
    made = tokenizer(list(texts), padding=padding, return_offsets_mapping=True, return_tensors="pt", **options)
    offsets = made.pop("offset_mapping")
    return dict(made), {name: of_characters(offsets, ranges[name]) for name in parts}


def of_token(input_ids: Int[Tensor, "batch tokens"], token: int) -> Bool[Tensor, "batch tokens"]:
    """Where one token stands, such as `config.image_token_id` that a processor repeats once per patch.

    Raises:
        InputError: where it stands nowhere.
    """
    mask = input_ids == token
    if not mask.any():
        raise InputError(f"token: {token} is nowhere in input_ids; did the processor see an image?")
    return mask


def of_runs(mask: Bool[Tensor, "batch tokens"]) -> list[Bool[Tensor, "batch tokens"]]:
    """Each unbroken run of a span by itself: image k of several, the same number of runs in no item needed.

    Example:
        >>> [run.int().tolist() for run in of_runs(torch.tensor([[True, True, False, True]]))]
        [[[1, 1, 0, 0]], [[0, 0, 0, 1]]]
    """
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    numbers = begins.cumsum(1)
    return [mask & (numbers == k) for k in range(1, int(numbers.max()) + 1)]


def of_ranges(
    tokens: int, ranges: Sequence[Sequence[Range]], attention_mask: Int[Tensor, "batch tokens"] | None = None
) -> Bool[Tensor, "batch tokens"]:
    """Tokens by number, counted from each item's first real token.

    Args:
        tokens: of the batch as it's padded.
        ranges: for each item, (first, one after the last).
        attention_mask: 0 for padding, on either side.

    Raises:
        InputError: where a range ends behind the item.
    """
    real = torch.ones(len(ranges), tokens) if attention_mask is None else attention_mask
    if real.shape != (len(ranges), tokens):
        raise InputError(f"attention_mask: {tuple(real.shape)}, expected {(len(ranges), tokens)}")
    real = real.bool()
    numbers = real.cumsum(1) - 1
    mask = torch.zeros_like(real)
    for item, parts in enumerate(ranges):
        for start, end in parts:
            if not 0 <= start < end <= int(real[item].sum()):
                raise InputError(f"ranges: {start} to {end} of item {item}, which has {int(real[item].sum())} tokens")
            mask[item] |= real[item] & (numbers[item] >= start) & (numbers[item] < end)
    return mask


def _found(text: str, part: str, name: str) -> Range:
    start = text.find(part) if part else -1
    if start < 0:
        raise InputError(f"parts: {name!r} {part!r} does not occur in {text!r}")
    if text.find(part, start + 1) >= 0:
        raise InputError(
            f"parts: {name!r} {part!r} occurs more than once in {text!r}; use of_characters with its range"
        )
    return start, start + len(part)
