"""Text of 27 symbols, as text8: a space and the letters a to z.

Source: Mahoney, "About the test data"; Nawrot et al. (2023), arXiv 2211.09761.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least

SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Chunks(NamedTuple):
    """Pieces of a text, and what comes behind each of their tokens; `start`, where each begins."""

    data: Int[Tensor, "chunks tokens"]
    target: Int[Tensor, "chunks tokens"]
    start: Int[Tensor, "chunks"]


def plain(text: str) -> str:
    """Lower case, digits spelled, accents gone, everything else a space, and spaces single.

    >>> plain("Café No. 42!")
    'cafe no four two'
    """
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    spelled = re.sub(r"[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", bare)
    return " ".join(re.sub(r"[^a-z]+", " ", spelled).split())


def encode(text: str) -> Int[Tensor, "characters"]:
    """Numbers of the symbols; the space is 0.

    >>> encode("a b").tolist()
    [1, 0, 2]
    """
    found = [SYMBOLS.find(c) for c in text]
    if -1 in found:
        at = found.index(-1)
        raise InputError(f"text: {text[at]!r} at {at} is none of the 27 symbols; call plain(text) before")
    return torch.tensor(found, dtype=torch.long)


def decode(ids: Int[Tensor, "characters"]) -> str:
    """The text of these numbers.

    >>> decode(encode("a b"))
    'a b'
    """
    return "".join(SYMBOLS[i] for i in ids.tolist())


def chunks(ids: Int[Tensor, "characters"], length: int) -> Chunks:
    """Pieces of `length`, one behind the other; what is left at the end is left out.

    >>> chunks(torch.arange(6), 2).target.tolist()
    [[1, 2], [3, 4]]
    """
    require_at_least(1, length=length)
    count = (len(ids) - 1) // length
    if count < 1:
        raise InputError(f"ids: expected more than {length} tokens for chunks of {length}, got {len(ids)}")
    start = torch.arange(count) * length
    rows = start[:, None] + torch.arange(length)
    return Chunks(ids[rows], ids[rows + 1], start)
