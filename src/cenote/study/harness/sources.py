"""Which code measured a result: a study, what it measures, and all that both import."""

from __future__ import annotations

import sys
from types import FunctionType


def source_of(module: str) -> str:
    """Digest of the code that the numbers of an imported study follow from.

    What the study names counts beside its own imports: the rooms find their classes in the catalog, where no import leads to.
    """
    from cenote.compare.sources import source_digest

    study = sys.modules[module]
    named = [
        v
        for v in vars(study).values()
        if isinstance(v, type | FunctionType) and getattr(v, "__module__", "").startswith("cenote.")
    ]
    return source_digest(study, *named)
