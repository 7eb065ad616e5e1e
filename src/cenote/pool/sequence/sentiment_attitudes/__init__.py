"""Sentiment attitudes: attentive encoders, terms, and the models of the attitude of one entity towards another."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
