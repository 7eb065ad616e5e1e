"""Where a result is from."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cenote.core.version import __version__


def provenance(called: str, **more: Any) -> dict[str, Any]:
    """When, by which command, with which versions, on which machine.

    Args:
        called: the function, where no command line of cenote was.
        more: what the job adds.
    """
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["cenote", *sys.argv[1:]]) if Path(sys.argv[0]).name == "cenote" else called,
        "versions": {
            "cenote": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        **more,
    }
