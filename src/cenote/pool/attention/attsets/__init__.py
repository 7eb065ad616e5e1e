"""AttSets: a weight for every token and every channel, and FASet, which trains it."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
