"""What a piece of work may take, and when memory goes back to the system."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3

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
