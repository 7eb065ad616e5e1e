"""Ctrl-C, at whatever moment: one line, exit code 130.

Nothing of cenote is imported here: the program heeds it before anything heavy is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

EXIT = 130

_told: list[str] = []


def heed() -> None:
    """From now on; unless whoever started the program wants it to be ignored, as `nohup` and `&` in a script do."""
    _told.clear()
    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


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
