"""Graph Parsing Networks: pooling whose depth and sizes follow from each graph."""

from cenote.core.moved import formerly

__getattr__ = formerly(__name__)
