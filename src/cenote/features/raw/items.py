"""Raw items on disk: their names, their labels, and how one of them is read."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cenote.features.table import Column

Kind = Literal["image", "audio", "text"]


class Audio(NamedTuple):
    """One channel of sound, from -1 to 1, at so many samples a second."""

    samples: NDArray[np.float32]
    rate: int


class Read(NamedTuple):
    """An item as the model's preprocessing wants it (image: `PIL.Image` in RGB), and the digest of its raw bytes."""

    content: Any
    digest: bytes


class UnreadableError(Exception):
    """Why one item cannot be used; the reader knows which item it is."""


class Item(ABC):
    """One raw item; small, and can be sent to another machine that sees the same files."""

    id: str

    @abstractmethod
    def read(self) -> Read:
        """Read and decode it.

        Raises:
            UnreadableError: where it is missing, damaged or empty.
        """

    def check(self) -> None:
        """Find out whether it can be read, at less cost where that is possible.

        Raises:
            UnreadableError: where it is missing, damaged or empty.
        """
        self.read()

    @abstractmethod
    def stamp(self) -> str:
        """What tells its content from another without reading a file: a file's size, a text's digest."""

    def limited(self, most: int) -> Item:
        """The same, which may take so many bytes in memory; what is there already takes no more."""
        del most
        return self

    def location(self) -> str | None:
        """Where its bytes lie, for those who want to show it (see `bytes_at`, `text_at`): a file, or `table#column/row`."""
        return None

    def changed(self, digest: bytes) -> bool:
        """Whether its content is no longer what had this digest. It is read: neither size nor time tells a content."""
        del digest  # a text is its own content: the stamp has told
        return False


@dataclass(frozen=True)
class RawItems:
    """Everything that a folder or a table holds.

    Attributes:
        kind: image, audio or text.
        format: in words.
        items: in a fixed order.
        columns: labels, split, group and the like, a cell per item.
        class_names: names of the classes of columns that store class numbers.
        used: columns that are known not to be labels.
    """

    kind: Kind
    format: str
    items: Sequence[Item]
    columns: Mapping[str, Column]
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    used: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.items)

    def only(self, numbers: Sequence[int]) -> RawItems:
        """Some of them, with their cells of every column."""
        columns: dict[str, Column] = {name: [cells[i] for i in numbers] for name, cells in self.columns.items()}
        return replace(self, items=[self.items[i] for i in numbers], columns=columns)

    def limited(self, most: int) -> RawItems:
        """The same, of which none may take more than so many bytes; a text takes what it takes already."""
        return replace(self, items=[item.limited(most) for item in self.items])

    def sha256(self) -> str:
        """Over names and stamps of the items, in their order."""
        digest = hashlib.sha256(self.kind.encode())
        for item in self.items:
            digest.update(f"\n{item.id}\t{item.stamp()}".encode())
        return digest.hexdigest()


def digest_of(data: bytes | memoryview) -> bytes:
    """16 bytes that tell one raw content from another."""
    return hashlib.blake2b(data, digest_size=16).digest()
