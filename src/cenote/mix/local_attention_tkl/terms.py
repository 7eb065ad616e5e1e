"""Terms of texts, their numbers, and search by BM25."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse import csr_array
from torch import Tensor

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_positive

PAD, UNKNOWN = 0, 1
FIRST = 2
"""Number of the first known term."""
WORD = re.compile(r"[^\W_]+")


class Term(NamedTuple):
    """A term of a text, and where it stands there."""

    word: str
    start: int
    end: int


def terms_of(text: str) -> list[Term]:
    """Letters and digits that stand together, in small letters.

    >>> [term.word for term in terms_of("Wing-body, Mach 2.0")]
    ['wing', 'body', 'mach', '2', '0']
    """
    return [Term(found[0].lower(), found.start(), found.end()) for found in WORD.finditer(text)]


class TermVocabulary:
    """Numbers of terms: 0 fills up, 1 is every term that is not known, then the known ones, most frequent first.

    Args:
        words: in their order.

    Example:
        >>> TermVocabulary.of(["heat of wings", "wings"]).encode(["hot wings", "heat"]).tolist()
        [[1, 2], [3, 0]]
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self.numbers = {word: FIRST + i for i, word in enumerate(self.words)}
        if len(self.numbers) < len(self.words):
            raise InputError("words: some stand there twice")

    def __len__(self) -> int:
        return len(self.words) + FIRST

    @classmethod
    def of(cls, texts: Iterable[str], min_count: int = 1, most: int | None = None) -> Self:
        """The terms of texts.

        Args:
            texts: documents, and queries where these may hold others.
            min_count: rarer terms are not known.
            most: so many terms alone, the most frequent.
        """
        require_at_least(1, min_count=min_count)
        counts = Counter(term.word for text in texts for term in terms_of(text))
        known = [word for word, count in sorted(counts.items(), key=lambda i: (-i[1], i[0])) if count >= min_count]
        if not known:
            raise InputError("texts: hold no term")
        return cls(known[:most])

    def encode(self, texts: Sequence[str], most: int | None = None) -> Int[Tensor, "texts terms"]:
        """Numbers of the terms of texts, padded behind to the longest, of each the first `most`."""
        rows = [[self.numbers.get(t.word, UNKNOWN) for t in terms_of(text)][:most] for text in texts]
        width = max((len(row) for row in rows), default=0)
        return torch.tensor([[*row, *[PAD] * (max(width, 1) - len(row))] for row in rows], dtype=torch.long).view(
            len(rows), max(width, 1)
        )


class BM25:
    """`sum_t idf(t) tf (k1 + 1) / (tf + k1 (1 - b + b length / mean length))`, `idf = log(1 + (n - df + 0.5) / (df + 0.5))`.

    Args:
        texts: the collection.
        k1, b: as usual.

    Example:
        >>> BM25(["heat of wings", "wings", "birds"]).scores(["heat"]).argmax(1).tolist()
        [0]
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        require_positive(k1=k1)
        if not 0 <= b <= 1:
            raise InputError(f"b: expected a share from 0 to 1, got {b}")
        if not texts:
            raise InputError("texts: give at least one")
        self.vocabulary = TermVocabulary.of(texts)
        counts = [Counter(self.vocabulary.numbers[t.word] - FIRST for t in terms_of(text)) for text in texts]
        rows = np.repeat(np.arange(len(texts)), [len(c) for c in counts])
        columns = np.array([term for c in counts for term in c], dtype=np.int64)
        tf = np.array([count for c in counts for count in c.values()], dtype=np.float64)
        lengths = np.array([c.total() for c in counts], dtype=np.float64)
        df = np.bincount(columns, minlength=len(self.vocabulary.words))
        idf = np.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        long = 1 - b + b * lengths[rows] / lengths.mean()
        weights = idf[columns] * tf * (k1 + 1) / (tf + k1 * long)
        self.weights = csr_array((weights, (rows, columns)), shape=(len(texts), len(df)))

    def scores(self, queries: Sequence[str]) -> Float[ndarray, "queries documents"]:
        """Of all documents; terms count as often as the query has them."""
        asked = np.zeros((len(queries), self.weights.shape[1]))
        for i, query in enumerate(queries):
            for term in terms_of(query):
                number = self.vocabulary.numbers.get(term.word)
                if number is not None:
                    asked[i, number - FIRST] += 1
        return (self.weights @ asked.T).T

    def first(self, queries: Sequence[str], k: int) -> list[list[int]]:
        """Numbers of the `k` best documents of each query, best first; those without any of its terms are left out."""
        require_at_least(1, k=k)
        found = []
        for row in self.scores(queries):
            order = np.lexsort((np.arange(len(row)), -row))[:k]
            found.append([int(i) for i in order if row[i] > 0])
        return found


def idf_of(texts: Sequence[str], vocabulary: TermVocabulary) -> Float[Tensor, "terms"]:
    """`log((n + 1) / (df + 1))` of each number; 0 of what fills up, the largest of what is not known."""
    df = Counter(
        number for text in texts for number in {vocabulary.numbers.get(t.word, UNKNOWN) for t in terms_of(text)}
    )
    found = torch.tensor([math.log((len(texts) + 1) / (df.get(i, 0) + 1)) for i in range(len(vocabulary))])
    found[PAD], found[UNKNOWN] = 0.0, math.log(len(texts) + 1)
    return found
