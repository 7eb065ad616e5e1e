"""What exists: the published systems and the methods that can be built by name."""

from cenote.catalog.entries import Method, System, create, find, method, methods, systems

__all__ = ["Method", "System", "create", "find", "method", "methods", "systems"]
