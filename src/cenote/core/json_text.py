"""JSON that every reader takes; apart from `files`, so that a command that only tells imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, **how: Any) -> str:
    """JSON that every reader takes: it has no word for what is not known or infinite, so that is null.

    Args:
        value: as `json.dumps` takes it.
        how: its other arguments.

    Example:
        >>> json_text({"metric": float("nan"), "interval": (0.5, float("inf"))})
        '{"metric": null, "interval": [0.5, null]}'
    """
    return json.dumps(_null_for_nan(value), allow_nan=False, **how)


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _null_for_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
