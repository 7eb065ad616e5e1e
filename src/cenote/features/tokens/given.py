"""The source of what somebody gives as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cenote.core import Bags
from cenote.core.graphs import Graphs
from cenote.features.tokens.arrays import Padded, Ragged
from cenote.features.tokens.graphs import Nodes
from cenote.features.tokens.layers import PaddedLayers, RaggedLayers
from cenote.features.tokens.source import Features, TokenSource


def as_source(x: Features) -> TokenSource:
    """Of arrays of one layer, or of graphs; a source stays what it is.

    >>> type(as_source(torch.ones(5, 17, 64))).__name__
    'Padded'
    """
    if isinstance(x, TokenSource):
        return x
    if isinstance(x, Graphs):
        return Nodes(x)
    return Ragged(x) if isinstance(x, Bags) else Padded(x)


def stacked(x: Tensor | Bags, layers: Sequence[int]) -> PaddedLayers | RaggedLayers:
    """Of several layers: `[items, layers, tokens, dim]`, or `Bags` of width `layers * dim`, the layers of a token side by side.

    Raises:
        InputError: where the numbers of the layers do not fit.
    """
    return RaggedLayers(x, layers) if isinstance(x, Bags) else PaddedLayers(x, layers)
