"""What cenote finds out for a person: one folder a job, with the same file names in each.

`job.py` what it does, `arms.py` what is compared, `measure.py` the metrics, `result.py` what comes out.
"""

from importlib import import_module
from typing import Any

__all__ = ["explain", "extract", "index", "probe", "reduce"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"cenote.jobs.{name}")
    raise AttributeError(f"module 'cenote.jobs' has no attribute {name!r}")
