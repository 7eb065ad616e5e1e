"""Subwords that two languages share: byte-pair encoding, learnt from text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.core.errors import InputError

PAD, START, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CLOSED = "\u2581"
"""Ends the last subword of a word."""


class Subwords:
    """A vocabulary of subwords, the pairs that it merges in order.

    Args:
        merges: the pairs, the earlier the sooner.
        alphabet: single characters that are subwords.

    Attributes:
        names: of each subword, its number its place; the first four are padding, start, end, and unknown.

    Example:
        >>> subwords = Subwords.learn(["low lower lowest"], merges=3)
        >>> subwords.split("low lowly")
        ['lo', 'w▁', 'low', 'l', 'y▁']
        >>> subwords.text(subwords.encode("lower low"))
        'lower low'

    Source: Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL 2016.
    """

    def __init__(self, merges: Sequence[tuple[str, str]], alphabet: Iterable[str]) -> None:
        self.merges = {pair: rank for rank, pair in enumerate(merges)}
        letters = sorted(set(alphabet))
        pieces = [*letters, *(letter + CLOSED for letter in letters), *("".join(pair) for pair in merges)]
        self.names = [*SPECIAL, *dict.fromkeys(pieces)]
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._split: dict[str, list[str]] = {}

    @classmethod
    def learn(cls, lines: Iterable[str], merges: int) -> Subwords:
        """Merge, again and again, the pair of neighbours that is most frequent; of equal ones the first by name.

        Args:
            lines: of text, words between spaces; for a shared vocabulary those of both languages.
            merges: how often; fewer where nothing is left to merge.

        Raises:
            InputError: where there is no word.
        """
        words = Counter(word for line in lines for word in line.split())
        if not words:
            raise InputError("lines: have no word to learn subwords from")
        pieces = {word: [*word[:-1], word[-1] + CLOSED] for word in words}
        found: list[tuple[str, str]] = []
        for _ in range(merges):
            pairs: Counter[tuple[str, str]] = Counter()
            for word, parts in pieces.items():
                for pair in itertools.pairwise(parts):
                    pairs[pair] += words[word]
            if not pairs:
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            found.append(best)
            pieces = {word: _merged(parts, best) for word, parts in pieces.items()}
        return cls(found, {letter for word in words for letter in word})

    def __len__(self) -> int:
        return len(self.names)

    def split(self, line: str) -> list[str]:
        """The subwords of a text."""
        return [piece for word in line.split() for piece in self._pieces(word)]

    def encode(self, line: str) -> list[int]:
        """Their numbers, and that of the end."""
        return [*(self._numbers.get(piece, UNKNOWN) for piece in self.split(line)), END]

    def text(self, numbers: Iterable[int]) -> str:
        """The text of numbers up to the end; start and padding are left out."""
        pieces: list[str] = []
        for number in numbers:
            if number == END:
                break
            if number not in (PAD, START):
                pieces.append(self.names[number] if number != UNKNOWN else SPECIAL[UNKNOWN] + CLOSED)
        return "".join(pieces).replace(CLOSED, " ").strip()

    def batch(self, lines: Sequence[str]) -> Int[Tensor, "batch tokens"]:
        """Texts as numbers, each with its end, padded on the right."""
        return padded([self.encode(line) for line in lines])

    def _pieces(self, word: str) -> list[str]:
        if word not in self._split:
            parts = [*word[:-1], word[-1] + CLOSED]
            while True:
                pairs = [pair for pair in itertools.pairwise(parts) if pair in self.merges]
                if not pairs:
                    break
                parts = _merged(parts, min(pairs, key=self.merges.__getitem__))
            self._split[word] = parts
        return self._split[word]


def padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "batch tokens"]:
    """Rows of numbers as one tensor, 0 behind the shorter ones.

    >>> padded([[3, 4], [5]]).tolist()
    [[3, 4], [5, 0]]
    """
    found = torch.full((len(rows), max((len(row) for row in rows), default=0)), PAD)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return found


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return found
