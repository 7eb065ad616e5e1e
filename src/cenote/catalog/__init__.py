"""What exists: the published systems, the methods that can be built by name, and the public names of the rooms."""

from cenote.catalog.entries import Method, System, create, find, import_own, method, methods, systems
from cenote.catalog.names import ROOMS, lazy, public
from cenote.catalog.parts import Part, parts
from cenote.core.later import load

__all__ = [
    "ROOMS",
    "Method",
    "Part",
    "System",
    "create",
    "find",
    "import_own",
    "lazy",
    "load",
    "method",
    "methods",
    "parts",
    "public",
    "systems",
]
