"""Layer-aware TDNN: one vector of a clip from all hidden states of a speech model."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
