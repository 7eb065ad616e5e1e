"""Word vectors in the text format of word2vec, which gensim, fastText and spaCy read too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cenote.core import files
from cenote.core.errors import InputError


class WordVectors:
    """Words and their vectors.

    Args:
        words: each once.
        vectors: `[words, dim]`.

    Raises:
        InputError: where the two do not fit each other.

    Example:
        >>> known = WordVectors(["a", "b"], torch.eye(2))
        >>> known.number["b"], "c" in known.number
        (1, False)
    """

    def __init__(self, words: Sequence[str], vectors: Float[Tensor, "words dim"]) -> None:
        self.words = list(words)
        self.vectors = vectors
        self.number = {word: i for i, word in enumerate(self.words)}
        if vectors.dim() != 2 or len(self.words) != vectors.shape[0]:
            raise InputError(
                f"vectors: expected [{len(self.words)}, dim] for {len(self.words)} words, got {tuple(vectors.shape)}"
            )
        if len(self.number) != len(self.words):
            twice = next(w for i, w in enumerate(self.words) if self.number[w] != i)
            raise InputError(f"words: {twice!r} stands twice; keep one vector per word")

    def __len__(self) -> int:
        return len(self.words)

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return self.vectors.shape[1]

    def joined(self, new: WordVectors) -> WordVectors:
        """These vectors with those of other words; a word that stands in both gets the new vector.

        Raises:
            InputError: where the widths differ.

        Example:
            >>> old, new = WordVectors(["a", "b"], torch.zeros(2, 1)), WordVectors(["b", "c"], torch.ones(2, 1))
            >>> both = old.joined(new)
            >>> both.words, both.vectors.flatten().tolist()
            (['a', 'b', 'c'], [0.0, 1.0, 1.0])
        """
        if new.dim != self.dim:
            raise InputError(f"new: its vectors have width {new.dim}, these have {self.dim}; join vectors of one model")
        rows = dict(zip(self.words, self.vectors, strict=True)) | dict(zip(new.words, new.vectors, strict=True))
        return WordVectors(list(rows), torch.stack(list(rows.values())))

    @classmethod
    def read(cls, path: str | Path, at_most: int | None = None) -> WordVectors:
        """Read the text format of word2vec: a line `count dim`, then `word number number ...` per line.

        Args:
            path: the file; the first line may be missing, as in GloVe's files.
            at_most: only the first so many words.

        Raises:
            InputError: naming the first line that cannot be read.
        """
        path = Path(path)
        words: list[str] = []
        rows: list[list[float]] = []
        dim: int | None = None
        try:
            with path.open(encoding="utf-8", newline="\n") as file:
                for number, line in enumerate(file, 1):
                    parts = line.rstrip().split(" ")
                    if number == 1 and len(parts) == 2 and all(p.isdigit() for p in parts):
                        dim = int(parts[1])
                        continue
                    dim = len(parts) - 1 if dim is None else dim
                    word, row = " ".join(parts[:-dim]), _numbers(parts[-dim:])
                    if row is None or not word or len(row) != dim:
                        raise InputError(f"{path}: line {number} is not a word and {dim} finite numbers; correct it")
                    words.append(word)
                    rows.append(row)
                    if len(words) == at_most:
                        break
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text ({error}); name a word2vec text file") from error
        if not words:
            raise InputError(f"{path}: holds no word; name a word2vec text file")
        return cls(words, torch.tensor(rows))

    def save(self, path: str | Path) -> None:
        """Write the text format of word2vec.

        Raises:
            InputError: where a word holds white space, which the format cannot tell from its end.
        """
        for word in self.words:
            if not word or any(c.isspace() for c in word):
                raise InputError(f"words: {word!r} is empty or holds white space; the format separates by it")
        lines = [f"{len(self)} {self.dim}"]
        lines += [
            f"{w} {' '.join(f'{v:.6g}' for v in row)}" for w, row in zip(self.words, self.vectors.tolist(), strict=True)
        ]
        files.write_whole(Path(path), "\n".join(lines) + "\n")


def _numbers(texts: list[str]) -> list[float] | None:
    try:
        row = [float(t) for t in texts]
    except ValueError:
        return None
    return row if all(map(math.isfinite, row)) else None
