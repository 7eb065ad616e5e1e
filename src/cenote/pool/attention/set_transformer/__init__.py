"""Set Transformer: sets encoded by attention, and the mixtures that it learns to cluster."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
