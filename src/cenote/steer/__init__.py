"""Change where a running model looks, then put it back."""

from cenote.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
