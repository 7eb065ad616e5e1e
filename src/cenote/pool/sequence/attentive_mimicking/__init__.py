"""Attentive Mimicking: vectors of rare words from their letters and contexts."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
