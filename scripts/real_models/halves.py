"""Half the disk: weights in float16, which load in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save_half(model: Any, out: Path) -> None:
    """Save a transformers model in float16, with a configuration that says float32."""
    model.half().save_pretrained(out)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"dtype": "float32"}, indent=2), "utf-8")
