"""Multi-Layers Trainable Pooling: pools of layer stacks and of tokens, and what trains and searches with them."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
