"""Graphs as graph pools read them: batches with edges instead of padding."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.core import InputError
from cenote.core.graphs import Graphs
from cenote.features.dataset import TokenDataset


@dataclass(frozen=True)
class GraphDataset(TokenDataset):
    """A `TokenDataset` of `Graphs` whose batches are `Graphs` too."""

    pads = False

    def batch(self, items: Int[Tensor, "chosen"]) -> Any:
        """`(graphs, None)` of some items."""
        return self.graphs(items), None

    def copies(self, index: int, count: int = 1) -> Any:
        """One graph, so many times, in float32."""
        return self.graphs(torch.full((count,), index)).to(torch.float32)


def with_edges(data: TokenDataset) -> GraphDataset:
    """The same items as graph pools read them.

    Raises:
        InputError: where there are no edges.
    """
    if not isinstance(data.x, Graphs):
        raise InputError(f"{data.name}: has no edges between tokens")
    return GraphDataset(**{f.name: getattr(data, f.name) for f in fields(TokenDataset)})
