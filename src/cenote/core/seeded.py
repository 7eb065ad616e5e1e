"""torch's global generator, which all threads share, for work that must draw the same numbers each time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The generator of the CPU starts from a seed, and is as it was when this is over; other threads that ask for it wait.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(1)
        >>> with seeded(0):
        ...     first == torch.rand(1)
        tensor([True])
    """
    with _ONE_AT_A_TIME:
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before)
