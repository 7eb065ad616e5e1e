"""Memory for the tokens of a shard while it is computed: pages that the next shard uses again.

Tokens come batch by batch, in another order than they are stored in, and how many they are is known last. In pages nothing
has to be moved when they grow in number, and what was taken from the system once is enough for all shards that follow.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

PAGE, SLAB = 2**19, 2**22


class Pages:
    """Pages of one kind of token, given out and taken back.

    Args:
        dim: width of a token.
        dtype: of its numbers.
        page: bytes of a page, of whole tokens.
        slab: bytes taken from the system at a time.

    Example:
        >>> pages = Pages(dim=4, dtype=torch.float16)
        >>> one = pages.take()
        >>> one.shape
        torch.Size([65536, 4])
        >>> pages.give([one])
        >>> pages.take().data_ptr() == one.data_ptr()
        True
    """

    def __init__(self, dim: int, dtype: torch.dtype, page: int = PAGE, slab: int = SLAB) -> None:
        self.dim, self.dtype = dim, dtype
        self.token = dim * torch.empty(0, dtype=dtype).element_size()
        self.rows = max(page // self.token, 1)
        self.slab = slab
        self._free: list[Tensor] = []

    def take(self) -> Float[Tensor, "rows dim"]:
        """A page, of whatever content."""
        try:
            return self._free.pop()
        except IndexError:
            self._free += self._slab()
            return self._free.pop()

    def give(self, pages: Iterable[Tensor]) -> None:
        """Take pages back."""
        self._free += pages

    def _slab(self) -> list[Tensor]:
        size = self.rows * self.token
        count = max(self.slab // size, 1)
        # not from the heap, where small numbers would come to lie between such blocks
        memory = mmap.mmap(-1, count * size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=self.dtype)
        return list(flat.view(count, self.rows, self.dim).unbind())


class Collected:
    """Tokens of the items of one shard at some layers, in the order in which they were computed.

    Args:
        pages: where to keep them.
        layers: numbers of the layers.
    """

    def __init__(self, pages: Pages, layers: Sequence[int]) -> None:
        self.pages = pages
        self.layers = tuple(layers)
        self._held: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._count = 0
        self._one = Lock()

    def reserve(self, count: int) -> int:
        """Room for so many tokens at every layer, for one thread to fill: where it begins."""
        with self._one:
            begin = self._count
            self._count += count
            for held in self._held.values():
                while len(held) * self.pages.rows < self._count:
                    held.append(self.pages.take())
        return begin

    def put(
        self, layer: int, begin: int, pieces: Iterable[Float[Tensor, "tokens dim"]]
    ) -> Iterator[Float[Tensor, "some dim"]]:
        """Put tokens where room was made, converted in the same copy; gives back where they are now, in some pieces."""
        held = self._held[layer]
        at = begin
        for piece in pieces:
            count, done = piece.shape[0], 0
            for number, low, high in self._spans(at, at + count):
                # most pieces lie within a page, and there are many of them
                held[number][low:high].copy_(piece if high - low == count else piece[done : done + high - low])
                done += high - low
            at += count
        return (held[number][low:high] for number, low, high in self._spans(begin, at))

    def in_order(
        self, layer: int, starts: Sequence[int], lengths: Sequence[int], scratch: NDArray[np.uint8]
    ) -> Iterator[NDArray[np.uint8]]:
        """The bytes of one layer with the items in another order, in pieces that are gone when the next one is asked for.

        Args:
            layer: one of the layers.
            starts: per item in the wanted order its first token.
            lengths: per item its tokens.
            scratch: `[some, bytes of a token]`, where small pieces are put together.
        """
        held = [page.view(torch.uint8).numpy() for page in self._held[layer]]
        filled, room = 0, len(scratch)
        for start, stop in _runs(starts, lengths):
            for number, low, high in self._spans(start, stop):
                count = high - low
                if filled + count > room:
                    yield scratch[:filled]
                    filled = 0
                if count > room:
                    yield held[number][low:high]
                    continue
                scratch[filled : filled + count] = held[number][low:high]
                filled += count
        yield scratch[:filled]

    def free(self) -> None:
        """Give the pages back; nothing is left."""
        for held in self._held.values():
            self.pages.give(held)
            held.clear()
        self._count = 0

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Which pages some tokens lie in, and from where to where."""
        rows = self.pages.rows
        while start < stop:
            number, low = divmod(start, rows)
            high = min(low + stop - start, rows)
            yield number, low, high
            start += high - low


def _runs(starts: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Beginnings and ends; neighbours that stay neighbours as one.

    >>> list(_runs([4, 6, 0], [2, 3, 4]))
    [(4, 9), (0, 4)]
    """
    begin = end = 0
    for start, length in zip(starts, lengths, strict=True):
        if start != end:
            if end > begin:
                yield begin, end
            begin = start
        end = start + length
    if end > begin:
        yield begin, end
