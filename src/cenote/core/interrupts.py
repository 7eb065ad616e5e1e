"""Ctrl-C, and what a machine sends instead, at moments at which nothing may be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C; what schedulers, `kill` and `timeout` send; what a terminal sends that is closed, where there is such a signal."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until this is over, and then does what it would have done. For moments: nobody can stop what is inside.

    Example:
        >>> with uninterrupted():
        ...     done = True
    """
    # they only ever come to the main thread, and a handler that was set outside of Python cannot be put back
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDING if here and callable(signal.getsignal(number))}
    caught: list[Any] = []
    for number in before:
        signal.signal(number, lambda *args: caught.append(args))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        handler = before[caught[0][0]]
        assert callable(handler)
        handler(*caught[0])
