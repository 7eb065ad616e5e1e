"""Ctrl-C, and what a machine sends instead (SIGTERM, SIGHUP), at whatever moment: one line, exit code 130.

Nothing heavy is imported here: the program heeds them before that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

EXIT = 130
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""As in `cenote.core.interrupts`, which must not be imported yet."""

_told: list[str] = []


def heed() -> None:
    """From now on; unless whoever started the program wants one to be ignored, as `nohup` and `&` in a script do."""
    _told.clear()
    if threading.current_thread() is not threading.main_thread():
        return
    for number in ENDING:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _interrupted)


def tell(text: str = "") -> None:
    """Say that it was, and what that means; once, whoever comes first."""
    if not _told:
        _told.append(text)
        sys.stderr.write(f"interrupted{text and ': '}{text}\n")
        sys.stderr.flush()


def _interrupted(_number: int, frame: FrameType | None) -> None:
    # an exception in the middle of an import may be swallowed by a library, or leave it half imported; nothing is lost by going
    while frame is not None:
        if "importlib._bootstrap" in frame.f_code.co_filename:
            if sys.stdout.isatty():
                # which a bar may have hidden
                sys.stdout.write("\x1b[?25h")
                sys.stdout.flush()
            tell()
            os._exit(EXIT)
        frame = frame.f_back
    raise KeyboardInterrupt
