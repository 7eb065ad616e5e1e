"""The words around a word, gathered from a text."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cenote.core.errors import InputError
from cenote.core.requirements import require_several

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
AROUND = 25


class Context(NamedTuple):
    """The known words around one occurrence of a word.

    Attributes:
        words: their numbers.
        distances: how far from the word each stands, negative before it.
    """

    words: tuple[int, ...]
    distances: tuple[int, ...]


def tokenised(line: str) -> list[str]:
    """Lower-cased words and punctuation marks.

    >>> tokenised("The cat's out, again.")
    ['the', "cat's", 'out', ',', 'again', '.']
    """
    return WORD.findall(line.lower())


def lines_of(text: str | Path | Iterable[str]) -> Iterator[str]:
    """Lines of a text file, or of anything that gives lines.

    Raises:
        InputError: where the file cannot be read.
    """
    if not isinstance(text, str | Path):
        yield from text
        return
    try:
        with Path(text).open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"text: {text} cannot be read as text ({error}); name a file with a sentence per line"
        ) from error


def count_words(text: str | Path | Iterable[str]) -> Counter[str]:
    """How often each word stands in a text."""
    counts: Counter[str] = Counter()
    for line in lines_of(text):
        counts.update(tokenised(line))
    return counts


def contexts_of(
    words: Collection[str],
    text: str | Path | Iterable[str],
    known: Mapping[str, int],
    at_most: int = 100,
    around: int = AROUND,
    seed: int = 0,
) -> dict[str, list[Context]]:
    """Contexts of some words, in one pass over the text; of more than `at_most`, a fair sample.

    Args:
        words: whose contexts are wanted.
        text: a file, or sentences; one sentence per line.
        known: word -> number, of the words that have a vector. Others are left out of a context, and a context without any
            known word is left out altogether.
        at_most: contexts kept per word.
        around: words on each side that make a context.
        seed: of the sample.

    Example:
        >>> contexts_of(["fox"], ["the quick fox jumps", "fox"], {"the": 0, "jumps": 1})
        {'fox': [Context(words=(0, 1), distances=(-2, 1))]}

    Note:
        Every occurrence of the word itself is left out of its context: a model that may read it need not learn anything.
    """
    require_several(words=words)
    wanted = set(words)
    kept: dict[str, list[Context]] = {word: [] for word in words}
    seen: Counter[str] = Counter()
    rng = random.Random(seed)
    for line in lines_of(text):
        tokens = tokenised(line)
        for i, word in enumerate(tokens):
            if word not in wanted:
                continue
            near = [
                (known[t], j - i)
                for j, t in enumerate(tokens[max(0, i - around) : i + around + 1], max(0, i - around))
                if t != word and t in known
            ]
            if not near:
                continue
            context = Context(tuple(n for n, _ in near), tuple(d for _, d in near))
            seen[word] += 1
            if len(kept[word]) < at_most:
                kept[word].append(context)
            elif (place := rng.randrange(seen[word])) < at_most:
                kept[word][place] = context
    return kept
