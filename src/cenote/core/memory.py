"""What a piece of work may take, and when memory goes back to the system."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

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


def in_own_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in pages of its own, which go back to the system the moment it is freed.

    For what outlives the pieces of work that make it: in the common heap it would lie between their blocks, and stop these
    from ever being one again.

    Example:
        >>> in_own_pages((2, 3), torch.float16).shape
        torch.Size([2, 3])
    """
    numbers = math.prod(shape)
    if not numbers:
        return torch.empty(*shape, dtype=dtype)
    pages = mmap.mmap(-1, numbers * torch.empty(0, dtype=dtype).element_size())
    return torch.frombuffer(pages, dtype=dtype).view(*shape)
