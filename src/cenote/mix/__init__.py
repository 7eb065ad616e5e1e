"""N tokens -> N tokens."""

from cenote.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
