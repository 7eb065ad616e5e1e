"""CUNI's multimodal translation: attention over a text and a picture, and the translator around it."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
