"""cenote: everything that stands between a model's tokens and an answer."""

from cenote.catalog import create, find, method, methods, systems
from cenote.core import Bags, InputError

__version__ = "0.1.0"

__all__ = ["Bags", "InputError", "__version__", "create", "find", "method", "methods", "systems"]
