"""Words as n-grams of letters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from cenote.core.errors import InputError

BOUNDARY = "\x02"


class LetterNgrams:
    """Numbers for the n-grams of letters that are common in a vocabulary; number 0 stands for all others.

    A word is its letters between two boundary symbols, each of which counts as one letter, so that a word of one letter has an
    n-gram of three.

    Args:
        ngrams: the known n-grams; number `i + 1` is `ngrams[i]`.
        shortest, longest: lengths of n-grams.

    Example:
        >>> ngrams = LetterNgrams.count(["cat", "cats", "cut"], least=2, shortest=3, longest=3)
        >>> [n.replace("\\x02", "|") for n in ngrams.ngrams], ngrams.numbers("cat")
        (['|ca', 'cat'], [1, 2, 0])

    Source: Schick, Schütze, "Attentive Mimicking: Better Word Embeddings by Attending to Informative Contexts", NAACL 2019.
    """

    def __init__(self, ngrams: Sequence[str], shortest: int = 3, longest: int = 5) -> None:
        if not 1 <= shortest <= longest:
            raise InputError(f"shortest, longest: expected 1 <= shortest <= longest, got {shortest} and {longest}")
        self.ngrams = list(ngrams)
        self.shortest, self.longest = shortest, longest
        self._number = {n: i + 1 for i, n in enumerate(self.ngrams)}

    @classmethod
    def count(cls, words: Iterable[str], least: int = 4, shortest: int = 3, longest: int = 5) -> LetterNgrams:
        """The n-grams that stand at least `least` times in a vocabulary, the most frequent first."""
        empty = cls((), shortest, longest)
        counts = Counter(n for word in words for n in empty.of(word))
        return cls([n for n, count in counts.most_common() if count >= least], shortest, longest)

    def __len__(self) -> int:
        return len(self.ngrams) + 1

    def of(self, word: str) -> list[str]:
        """All n-grams of a word, known or not."""
        letters = f"{BOUNDARY}{word}{BOUNDARY}"
        return [
            letters[i : i + n]
            for n in range(self.shortest, self.longest + 1)
            for i in range(max(0, len(letters) - n + 1))
        ]

    def numbers(self, word: str) -> list[int]:
        """Numbers of a word's n-grams; `[0]` where it has none."""
        return [self._number.get(n, 0) for n in self.of(word)] or [0]
