"""AdaPool: a learned mixture of a robust mean and the exponential maximum of windows, and the way back."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
