"""Group generalized mean pooling, of whole sets and of windows."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
