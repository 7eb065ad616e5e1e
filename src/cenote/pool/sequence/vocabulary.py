"""Numbers for words, and for anything else that is told apart by its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core.requirements import require_at_least

NOTHING, UNKNOWN = 0, 1


class Vocabulary:
    """The numbers of names: 0 is padding, 1 a name that is not known, the others by how often they were seen.

    Args:
        names: that are known, in order.

    Example:
        >>> vocabulary = Vocabulary.learn([["a", "dog"], ["a", "cat"]])
        >>> ids, mask = vocabulary.batch([["a", "bird"], ["dog"]])
        >>> ids.tolist(), mask.tolist()
        ([[2, 1], [4, 0]], [[True, True], [True, False]])
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._numbers = {name: number for number, name in enumerate(self.names, UNKNOWN + 1)}

    @classmethod
    def learn(cls, sequences: Iterable[Iterable[str]], at_least: int = 1) -> Vocabulary:
        """The names that are seen `at_least` times or more; of equally frequent ones the first in the alphabet comes first."""
        require_at_least(1, at_least=at_least)
        seen = Counter(name for sequence in sequences for name in sequence)
        return cls(
            name for name, count in sorted(seen.items(), key=lambda pair: (-pair[1], pair[0])) if count >= at_least
        )

    def __len__(self) -> int:
        return len(self.names) + UNKNOWN + 1

    def __getitem__(self, name: str) -> int:
        return self._numbers.get(name, UNKNOWN)

    def batch(
        self, sequences: Sequence[Sequence[str]]
    ) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """`(numbers, mask)` of sequences padded on the right to the longest."""
        longest = max((len(s) for s in sequences), default=0)
        ids = torch.full((len(sequences), longest), NOTHING)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor([self[name] for name in sequence], dtype=torch.long)
        lengths = torch.tensor([len(s) for s in sequences], dtype=torch.long).unsqueeze(1)
        return ids, torch.arange(longest) < lengths
