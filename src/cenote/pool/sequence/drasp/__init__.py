"""DRASP: statistics of all frames and of the segments that matter, and the predictor of opinion scores around it."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
