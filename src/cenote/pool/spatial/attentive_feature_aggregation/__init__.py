"""Attentive feature aggregation: maps of several layers and scales, fused by where and what to trust."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
