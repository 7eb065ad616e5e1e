"""What a piece of work may take, and when memory goes back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

M_MMAP_THRESHOLD = -3
STATM = Path("/proc/self/statm")

MAX_ITEM_SIZE = 10**9
"""Bytes that one item may take in memory, unless a caller says otherwise: a file of a few kB can claim any size."""

CACHED_BYTES = 5 * 2**19
"""What is read twice fits in the caches of two cores; larger pieces were slower, smaller ones wait for each other."""


def return_freed_blocks(above: int = 2**20) -> bool:
    """From now on, blocks above so many bytes go back to the system as soon as they are freed.

    glibc keeps freed blocks of up to 32 MiB for later, and small numbers left between them stop it from ever reusing
    them as one: reading a huge set piece by piece would then take as much memory as reading it whole. For the whole
    process; does nothing, and says so by `False`, where the C library is another.
    """
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, above))
    except (OSError, AttributeError):
        return False


def return_holes() -> bool:
    """Give the freed memory between blocks that are in use back to the system, once; `False` where the C library is another.

    Between pieces of work of very different sizes, so that the holes of one piece do not stay beside the blocks of the next.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


class HeldMemory:
    """Keeps a process from holding more and more for pieces of work whose sizes vary, without asking at each of them.

    Blocks of many sizes tear the heap into holes. To give these back after every piece takes long, as the next one fetches
    the same pages again; so that is done only where more is held than ever was while the first pieces were worked on.
    """

    def __init__(self) -> None:
        self.most = 0
        self.learning = True

    def settle(self) -> bool:
        """Between two pieces: whether holes were given back. Where there is no `/proc` of Linux, they never are."""
        held = _resident_pages()
        if self.learning:
            self.most = max(self.most, held)
        elif held > self.most:
            returned = return_holes()
            # what is in use may have grown: not again until there is more of it
            self.most = max(self.most, _resident_pages() * 102 // 100)
            return returned
        return False


def _resident_pages() -> int:
    try:
        return int(STATM.read_text().split()[1])
    except OSError:
        return 0
