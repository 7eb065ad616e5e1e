"""Pool of items -> chosen items."""

from cenote.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
