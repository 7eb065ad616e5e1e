"""cenote: everything that stands between a model's tokens and an answer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cenote.catalog import ROOMS, create, find, method, methods, systems
from cenote.core import Bags, InputError

if TYPE_CHECKING:
    from cenote.probe import load as load
    from cenote.probe.estimators import ProbeClassifier as ProbeClassifier
    from cenote.probe.estimators import ProbeRegressor as ProbeRegressor

__version__ = "0.1.0"

# these need scikit-learn or scipy, or are whole floors: imported when they are first named
_LATER = {
    "ProbeClassifier": "cenote.probe.estimators",
    "ProbeRegressor": "cenote.probe.estimators",
    "load": "cenote.probe",
}
_FLOORS = ("catalog", "core", "features", "models", *ROOMS, "probe", "report", "scale", "study", "testing")

__all__ = [
    "Bags",
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


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in _FLOORS:
        return import_module(f"cenote.{name}")
    raise AttributeError(f"module 'cenote' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
