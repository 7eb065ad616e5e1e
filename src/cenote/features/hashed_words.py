"""Vectors of words without any model: for trying things, and for tests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.core import Bags, InputError

NAME = "hashed-words"
WIDTH = 64
NEIGHBOURS = 0.3
"""How much of a vector is that of the words on both sides."""


class HashedWords:
    """A unit-norm vector for each word: the sum of random directions of its trigrams, and some of its neighbours.

    Words that are spelled alike point alike, whatever they mean. The same on every machine.

    Args:
        width: of a vector, a multiple of 8 up to 512.

    Raises:
        InputError: for another width.

    Example:
        >>> words = HashedWords()
        >>> a, b, c = words.queries(["pooling", "pooled", "sinkhole"])
        >>> float(a[0] @ b[0]) > 0.3 > float(a[0] @ c[0])
        True
    """

    name, weights, punctuation, protect = NAME, "", False, 0
    layer: int | None = None
    max_length: int | None = None

    def __init__(self, width: int = WIDTH) -> None:
        if width % 8 or not 8 <= width <= 512:
            raise InputError(f"width: expected a multiple of 8 from 8 to 512, got {width}")
        self.width = width

    def documents(self, texts: Sequence[str]) -> Bags:
        """Vectors of documents."""
        if not texts:
            raise InputError("texts: expected at least one, got none")
        return Bags.from_list([torch.from_numpy(self._vectors(text)) for text in texts])

    def queries(self, texts: Sequence[str]) -> Bags:
        """Vectors of queries: the same."""
        return self.documents(texts)

    def words(self, text: str) -> list[str]:
        """What the vectors stand for."""
        # a text without a word is told by its characters
        return re.findall(r"\w+", text.lower()) or [text.strip()]

    def _vectors(self, text: str) -> NDArray[np.float32]:
        own = np.stack([_of_word(word, self.width) for word in self.words(text)])
        padded = np.pad(own, ((1, 1), (0, 0)))
        mixed = own + NEIGHBOURS * (padded[:-2] + padded[2:])
        return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=2**16)
def _of_word(word: str, width: int) -> NDArray[np.float64]:
    framed = f"<{word}>"
    pieces = [framed[i : i + 3] for i in range(max(1, len(framed) - 2))]
    total = np.sum([_direction(piece, width) for piece in (*pieces, framed)], axis=0)
    found: NDArray[np.float64] = total / np.linalg.norm(total)
    return found


@lru_cache(maxsize=2**16)
def _direction(piece: str, width: int) -> NDArray[np.float64]:
    # the digest's own bits: what generators draw from a seed may change
    digest = hashlib.blake2b(piece.encode("utf-8", "backslashreplace"), digest_size=width // 8).digest()
    return np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float64) * 2 - 1
