"""Whether the words of a verbalization are enough: measures, and the words that it is compared with.

Source: Feldhus et al. (2023), arXiv 2210.07222.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence

from cenote.core import InputError
from cenote.core.requirements import require_at_least


def top_words(scores: Sequence[float], k: int) -> tuple[int, ...]:
    """Places of the words with the largest scores, in the order of the text."""
    require_at_least(1, k=k)
    return tuple(sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:k]))


def first_words(count: int, k: int) -> tuple[int, ...]:
    """Places of the first words of a text of so many."""
    require_at_least(1, k=k)
    return tuple(range(min(k, count)))


def random_span(count: int, k: int, random_state: int) -> tuple[int, ...]:
    """Places of a run of words drawn at random."""
    require_at_least(1, k=k)
    start = random.Random(random_state).randint(0, max(0, count - k))
    return tuple(range(start, min(start + k, count)))


def contiguity(indices: Sequence[int]) -> float:
    """Share of the words whose neighbour in the list is their neighbour in the text; 1 of one word, 0 of none.

    >>> contiguity([3, 4, 5, 9])
    0.6666666666666666
    """
    if len(indices) < 2:
        return float(len(indices))
    return sum(b == a + 1 for a, b in itertools.pairwise(indices)) / (len(indices) - 1)


def simulatability(
    read: Callable[[Sequence[str]], int],
    texts: Sequence[Sequence[str]],
    chosen: Sequence[Sequence[int]],
    labels: Sequence[int],
) -> float:
    """Share of texts of which a reader who sees the chosen words alone names the label that the explained model gave.

    Args:
        read: from words to a label.
        texts: their words.
        chosen: places of the words that are shown, of each text.
        labels: what the model said.
    """
    if not len(texts) == len(chosen) == len(labels) or not labels:
        raise InputError(
            f"texts, chosen, labels: expected as many of each, got {len(texts)}, {len(chosen)}, {len(labels)}"
        )
    right = [read([t[i] for i in c]) == y for t, c, y in zip(texts, chosen, labels, strict=True)]
    return sum(right) / len(right)


def named_share(answer: str, words: Sequence[str], scores: Sequence[float], k: int = 5) -> float:
    """Share of the `k` words with the largest scores that an answer names.

    >>> named_share("It is because of 'thin'.", ["so", "thin"], [0.5, 0.9], k=2)
    0.5
    """
    said = set(re.findall(r"\w+", answer.lower()))
    top = [words[i].lower().strip(".,;:!?'\" ") for i in top_words(scores, k)]
    return sum(w in said for w in top) / len(top) if top else 0.0
