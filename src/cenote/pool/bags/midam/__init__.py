"""MIDAM: bags scored, and trained for their ranking on a few instances of each."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
