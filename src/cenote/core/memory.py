"""What a piece of work may take, and when memory goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MOST_KEPT = 2**25
"""glibc raises its threshold up to here by itself, and keeps twice as much at the heap's end."""

CACHED_BYTES = 5 * 2**19
"""What is read twice fits in the caches of two cores; larger pieces were slower, smaller ones wait for each other."""


def return_freed_blocks(above: int = 2**20) -> bool:
    """From now on, blocks above so many bytes go back to the system as soon as they are freed.

    glibc keeps freed blocks of up to 32 MiB for later, and small numbers left between them stop it from ever reusing
    them as one: reading a huge set piece by piece would then take as much memory as reading it whole. For the whole
    process; does nothing, and says so by `False`, where the C library is another.
    """
    return _told(M_MMAP_THRESHOLD, above)


@contextmanager
def freed_blocks_returned(above: int = 2**22) -> Iterator[bool]:
    """For as long as this lasts, blocks above so many bytes go back to the system as soon as they are freed.

    For work on pieces of many sizes, whose blocks would tear the heap into holes that few of them fit in. Smaller blocks
    stay in the heap, which keeps its end: to give that back and fetch it again with every block would take longest. After
    it, glibc keeps what it would after large blocks were freed.

    Example:
        >>> with freed_blocks_returned() as done:
        ...     done in (True, False)
        True
    """
    done = return_freed_blocks(above) and _told(M_TRIM_THRESHOLD, 2 * MOST_KEPT)
    try:
        yield done
    finally:
        return_freed_blocks(MOST_KEPT)


def return_holes() -> bool:
    """Give the freed memory between blocks that are in use back to the system, once; `False` where the C library is another.

    Between pieces of work of very different sizes, so that the holes of one piece do not stay beside the blocks of the next.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def _told(what: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(what, value))
    except (OSError, AttributeError):
        return False
