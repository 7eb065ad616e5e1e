"""Sets of words chosen by a dependency tree, and the reader of trees that people have on disk (CoNLL-U)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.masks import positions

ROOT, PADDING = -1, -2


class ParsedSentence(NamedTuple):
    """One sentence of a CoNLL-U file.

    Attributes:
        words: its words.
        heads: of each word the index of its head, -1 for the root.
        relations: of each word to its head.
        tags: universal part of speech of each word.
    """

    words: tuple[str, ...]
    heads: tuple[int, ...]
    relations: tuple[str, ...]
    tags: tuple[str, ...]


def read_conllu(path: str | Path) -> list[ParsedSentence]:
    """The sentences of a CoNLL-U file, UTF-8.

    Args:
        path: of the file.

    Raises:
        InputError: where there is no such file, or a line is not CoNLL-U, naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"path: there is no file {path}")
    return parse_conllu(path.read_text("utf-8"))


def parse_conllu(text: str) -> list[ParsedSentence]:
    """The sentences of a CoNLL-U text; multiword tokens (1-2) and empty nodes (1.1) are left out.

    Args:
        text: lines of ten columns between tabs, an empty line after each sentence. A head `_` stands for none: such a word
            is a root.

    Raises:
        InputError: naming the line that is not CoNLL-U.

    Example:
        >>> dogs = "1\\tDogs\\t_\\tNOUN\\t_\\t_\\t2\\tnsubj\\t_\\t_"
        >>> bark = "2\\tbark\\t_\\tVERB\\t_\\t_\\t0\\troot\\t_\\t_"
        >>> parse_conllu(dogs + "\\n" + bark)[0].heads
        (1, -1)
    """
    sentences: list[ParsedSentence] = []
    rows: list[tuple[str, int, str, str]] = []
    first_line = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if not line.strip():
            if rows:
                sentences.append(_sentence(rows, first_line))
            rows, first_line = [], number + 1
            continue
        if line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != 10:
            raise InputError(f"line {number}: expected 10 columns between tabs, got {len(columns)}: {line[:60]!r}")
        if "-" in columns[0] or "." in columns[0]:
            continue
        head = "0" if columns[6] == "_" else columns[6]
        if columns[0] != str(len(rows) + 1) or not head.isdecimal():
            raise InputError(
                f"line {number}: expected word number {len(rows) + 1} with a head, got id {columns[0]!r} and head {head!r}"
            )
        rows.append((columns[1], int(head) - 1, columns[7], columns[3]))
    return sentences


def _sentence(rows: Sequence[tuple[str, int, str, str]], line: int) -> ParsedSentence:
    words, heads, relations, tags = zip(*rows, strict=True)
    if max(heads) >= len(rows):
        raise InputError(
            f"line {line}: the sentence that begins here has {len(rows)} words, but a head points at word {max(heads) + 1}"
        )
    return ParsedSentence(words, heads, relations, tags)


def pad_heads(sentences: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """`(heads, mask)` of sentences padded on the right with -2 to the longest.

    Args:
        sentences: the heads of each.

    Example:
        >>> heads, mask = pad_heads([[1, -1], [-1]])
        >>> heads.tolist(), mask.tolist()
        ([[1, -1], [-1, -2]], [[True, True], [True, False]])
    """
    longest = max((len(s) for s in sentences), default=0)
    heads = torch.full((len(sentences), longest), PADDING)
    for i, s in enumerate(sentences):
        heads[i, : len(s)] = torch.tensor(s, dtype=heads.dtype)
    return heads, heads != PADDING


class Trees:
    """A batch of dependency trees, repaired where they are broken.

    Roots after the first hang on the first; so do words whose head is padding. A word on a cycle, or below one, does not
    reach the root.

    Args:
        heads: `[batch, tokens]`, of each word the index of its head, -1 for the root, -2 for padding.
        mask: `[batch, tokens]`, True on real words; default where `heads` is not -2.

    Attributes:
        real: `[batch, tokens]`, the real words.
        above: `[batch, tokens, tokens]`, whether `j` is `i` or above it; cost `O(tokens^3 log tokens)` per sentence.
        reaches: `[batch, tokens]`, the words from which climbing ends at the root.

    Raises:
        InputError: where shapes do not match, or a head is out of range.

    Example:
        >>> tree = Trees(torch.tensor([[1, -1, 1, 2]]))
        >>> tree.path(torch.tensor([0]), torch.tensor([3])).tolist()
        [[True, True, True, True]]
    """

    def __init__(self, heads: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None) -> None:
        if heads.dim() != 2 or heads.is_floating_point() or heads.dtype == torch.bool:
            raise InputError(
                f"heads: expected integers of shape [batch, tokens], got {heads.dtype} of shape {tuple(heads.shape)}"
            )
        if mask is not None and (mask.shape != heads.shape or mask.dtype != torch.bool):
            raise InputError(f"mask: expected bool of shape {tuple(heads.shape)} as heads, got {tuple(mask.shape)}")
        tokens = heads.shape[1]
        if heads.numel() and not torch.compiler.is_compiling():
            low, high = int(heads.min()), int(heads.max())
            if low < PADDING or high >= tokens:
                raise InputError(f"heads: expected numbers from -2 to {tokens - 1}, got {low} to {high}")
        self.real = heads != PADDING if mask is None else mask
        slots = torch.arange(tokens, device=heads.device)
        hangs = self.real & (heads >= 0)
        hangs = hangs & self.real.gather(1, heads.clamp(min=0)) if tokens else hangs
        is_root = self.real & ~hangs
        # where no word is a root, none reaches it
        first_root = positions(is_root) == 0
        root = torch.where(first_root, slots, 0).sum(1, keepdim=True)
        parents = torch.where(hangs, heads.clamp(min=0), root.expand_as(heads))
        self._parents = (parents.unsqueeze(-1) == slots) & self.real.unsqueeze(-1) & ~first_root.unsqueeze(-1)
        above = self._parents | (torch.eye(tokens, dtype=torch.bool, device=heads.device) & self.real.unsqueeze(-1))
        for _ in range(max(1, math.ceil(math.log2(max(tokens, 2))))):
            above = (above.float() @ above.float()) > 0
        self.above = above
        self.reaches = (above & first_root.unsqueeze(1)).any(-1)

    def head_word(self, spans: Int[Tensor, "batch 2"]) -> Int[Tensor, "batch"]:
        """The first word of each span whose head lies outside of it; the last word of the span where none does."""
        inside = span_mask(spans, self.real)
        leaves = inside & ~(self._parents & inside.unsqueeze(1)).any(-1)
        last = (spans[:, 1] - 1).clamp(min=0)
        return torch.where(leaves.any(1), leaves.int().argmax(1), last)

    def path(self, a: Int[Tensor, "batch"], b: Int[Tensor, "batch"]) -> Bool[Tensor, "batch tokens"]:
        """The words on the way from `a` to `b`, both included; empty where one of them does not reach the root."""
        over_a, over_b = self._over(a), self._over(b)
        return ((over_a ^ over_b) | self.meeting(a, b)) & self.connected(a, b).unsqueeze(1)

    def meeting(self, a: Int[Tensor, "batch"], b: Int[Tensor, "batch"]) -> Bool[Tensor, "batch tokens"]:
        """The lowest word that is above both `a` and `b`, as a mask; empty where they have none in common."""
        common = self._over(a) & self._over(b)
        depth = torch.where(common, self.above.sum(-1), 0)
        return common & (depth == depth.amax(1, keepdim=True)) & self.connected(a, b).unsqueeze(1)

    def connected(self, a: Int[Tensor, "batch"], b: Int[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
        """Whether both words reach the root."""
        both = torch.stack([a, b], 1)
        return self.reaches.gather(1, both).all(1)

    def near(self, words: Bool[Tensor, "batch tokens"], k: int) -> Bool[Tensor, "batch tokens"]:
        """The words at most `k` steps in the tree from one of `words`."""
        step = (self._parents | self._parents.transpose(1, 2)).float()
        for _ in range(min(k, words.shape[1])):
            words = words | ((words.float().unsqueeze(1) @ step).squeeze(1) > 0)
        return words

    def below(self, words: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """`words` and all their descendants."""
        return (self.above & words.unsqueeze(1)).any(-1)

    def _over(self, word: Int[Tensor, "batch"]) -> Bool[Tensor, "batch tokens"]:
        tokens = self.real.shape[1]
        return self.above.gather(1, word.view(-1, 1, 1).expand(-1, 1, tokens)).squeeze(1)


def span_mask(spans: Int[Tensor, "batch 2"], real: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """The real words from `spans[:, 0]` to before `spans[:, 1]`."""
    slots = torch.arange(real.shape[1], device=real.device)
    return (slots >= spans[:, :1]) & (slots < spans[:, 1:]) & real
