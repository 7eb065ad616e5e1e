"""Attentive temporal pooling: streams pooled frame by frame, and classifiers adapted to another domain."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
