"""Adaptive noise pooling: a query made of the tokens, the transformer before it, and sets that hide signal in noise."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
