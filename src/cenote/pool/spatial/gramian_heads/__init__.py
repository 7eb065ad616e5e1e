"""Gramian attention heads: class tokens made from the Gramian of the features, and the loss that keeps them apart."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
