"""Attention conditioned on a lexicon, the lexicons, and the classifier around them."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
