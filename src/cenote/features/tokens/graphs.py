"""Graphs in memory: their nodes as plain sets, or with the edges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from cenote.core.graphs import Graphs
from cenote.features.tokens.arrays import Ragged
from cenote.features.tokens.source import sha256_of


class Nodes(Ragged):
    """The nodes of graphs as pools of sets read them: batches are padded, and edges stay behind.

    Args:
        bags: the graphs.
    """

    bags: Graphs

    def __init__(self, bags: Graphs) -> None:
        super().__init__(bags)

    def edges(self) -> Int[Tensor, "items"]:
        return self.bags.edges()

    def with_edges(self) -> WithEdges:
        return WithEdges(self.bags)

    def fingerprint(self, targets: Sequence[Tensor], words: Sequence[str]) -> str:
        edges = [part for part in (self.bags.edge_index, self.bags.edge_attr) if part is not None]
        return sha256_of((self.bags.values, self.bags.offsets, *targets, *edges), words)


class WithEdges(Nodes):
    """Graphs as graph pools read them: batches are `Graphs`, and nothing is padded."""

    pads = False

    def batch(self, items: Int[Tensor, "chosen"]) -> tuple[Graphs, None]:  # type: ignore[override]
        return self.bags.select(items), None

    def copies(self, index: int, count: int = 1) -> Graphs:
        return self.bags.select(torch.full((count,), index)).to(torch.float32)
