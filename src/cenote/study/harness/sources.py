"""Which code measured a result: a study, what it measures, and all that both import."""

from __future__ import annotations

import sys

from cenote.compare.sources import source_digest


def source_of(module: str) -> str:
    """Digest of the code that the numbers of an imported study follow from."""
    return source_digest(sys.modules[module])
