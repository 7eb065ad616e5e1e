"""DeepLab: scores of a dense net, read at several distances and snapped to the edges of the image."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
