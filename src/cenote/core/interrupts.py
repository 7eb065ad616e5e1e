"""Ctrl-C at moments at which nothing may be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until this is over, and then does what it would have done. For moments: nobody can stop what is inside.

    Example:
        >>> with uninterrupted():
        ...     done = True
    """
    before = signal.getsignal(signal.SIGINT)
    # it only ever comes to the main thread, and a handler that was set outside of Python cannot be put back
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        before(*caught[0])
