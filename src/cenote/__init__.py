"""cenote: everything that stands between a model's tokens and an answer."""

import os
import sys
from importlib import import_module

if os.path.basename(sys.argv[0]).partition(".")[0] == "cenote":
    # the program itself: what follows takes a second
    import_module("cenote.cli.interrupts").heed()

from typing import TYPE_CHECKING, Any

from cenote.catalog import ROOMS, create, find, method, methods, systems
from cenote.core.errors import InputError
from cenote.core.moved import MODULES, OldModules
from cenote.core.version import __version__

if TYPE_CHECKING:
    from cenote.bridges.scikit_learn import ProbeClassifier as ProbeClassifier
    from cenote.bridges.scikit_learn import ProbeRegressor as ProbeRegressor
    from cenote.core.sets import Bags as Bags
    from cenote.features.given import Dataset as Dataset
    from cenote.jobs.probe import Reading as Reading
    from cenote.jobs.probe import embed as embed
    from cenote.jobs.probe import load as load
    from cenote.jobs.probe import predict as predict

# these need torch, scikit-learn or scipy, or are whole floors: imported when they are first named
_LATER = {
    "Bags": "cenote.core.sets",
    "Dataset": "cenote.features.given",
    "ProbeClassifier": "cenote.bridges.scikit_learn",
    "ProbeRegressor": "cenote.bridges.scikit_learn",
    "Reading": "cenote.jobs.probe",
    "embed": "cenote.jobs.probe",
    "load": "cenote.jobs.probe",
    "predict": "cenote.jobs.probe",
}
_FLOORS = (
    *("bridges", "catalog", "compare", "core", "features", "jobs", "models"),
    *ROOMS,
    *("report", "scale", "study", "testing"),
)
__all__ = [
    "InputError",
    "__version__",
    "create",
    "find",
    "method",
    "methods",
    "systems",
    *_LATER,
    *_FLOORS,
]

sys.meta_path.insert(0, OldModules())


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in _FLOORS or f"cenote.{name}" in MODULES:
        return import_module(f"cenote.{name}")
    raise AttributeError(f"module 'cenote' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
