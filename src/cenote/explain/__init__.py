"""Model and input -> a score per token, pixel, head."""

from cenote.catalog import lazy

__getattr__, __dir__ = lazy(__name__)
