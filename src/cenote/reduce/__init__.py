"""N tokens -> fewer tokens, and which went where."""

from cenote.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
