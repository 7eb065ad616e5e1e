"""Where the tokens of a data set are, and in which form pools get them."""

from cenote.features.tokens.arrays import Padded, Ragged
from cenote.features.tokens.given import as_source, stacked
from cenote.features.tokens.graphs import Nodes, WithEdges
from cenote.features.tokens.layers import PaddedLayers, RaggedLayers
from cenote.features.tokens.source import Features, TokenSource

__all__ = [
    "Features",
    "Nodes",
    "Padded",
    "PaddedLayers",
    "Ragged",
    "RaggedLayers",
    "TokenSource",
    "WithEdges",
    "as_source",
    "stacked",
]
