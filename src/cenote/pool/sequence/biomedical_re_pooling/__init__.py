"""Biomedical relation extraction: poolings over mentions and trees, and the classifiers around them."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
