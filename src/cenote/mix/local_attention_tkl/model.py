"""The whole model, from embeddings and from tokens.

Source: Hofstätter et al. (2020), arXiv 2005.04908.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.mix.local_attention_tkl.chunks import Chunks, MixedRepresentation, chunked
from cenote.mix.local_attention_tkl.windows import (
    MEANS,
    STRIDE,
    Regions,
    SaturatedWindows,
    Saturation,
    TopRegions,
    cosine,
    kernels,
    windowed,
)


class Scored(NamedTuple):
    """What a document is worth for a query, and why.

    Attributes:
        score: `[batch]`.
        regions: scores of windows, and which were chosen.
        chunks, packed: how many chunks there were, and how many of them were run.
    """

    score: Float[Tensor, "batch"]
    regions: Regions
    chunks: int
    packed: int


class TKL(nn.Module):
    """Scores of long documents: local self-attention in chunks, kernels, saturating windows, the best regions.

    Args:
        dim: width of the embeddings.
        heads, layers, hidden: of the contextualizer.
        means, deviations: of the kernels.
        chunk, overlap: terms in the core of a chunk, and around it on each side.
        window, stride: of the sliding windows.
        regions: how many windows, with their neighbours, make the score.
        saturation, robust: see `SaturatedWindows`.
        positions, apart: see `MixedRepresentation`.
        reuse: the same positions in every chunk; else they go on, and documents are at most as long as `documents`.
        queries, documents: positions that are learned.
        dropout: of the contextualizer.
        pack: leave chunks without a real term out of it; which changes no score.
        published: as in the authors' code, whose scores depend on how far a document is padded: up to `overlap - 1` last terms
            may be lost, which windows there are at the end depends on the batch, and short documents count windows twice.

    Example:
        >>> model = TKL(8, heads=2, layers=1, hidden=8)
        >>> terms = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 90, dtype=torch.bool)
        >>> model(torch.randn(1, 4, 8), torch.randn(1, 90, 8), *terms).shape
        torch.Size([1])

    Source: Hofstätter et al. (2020), arXiv 2005.04908, and matchmaker's `sigir20_tkl.py`.
    """

    def __init__(
        self,
        dim: int = 300,
        *,
        heads: int = 10,
        layers: int = 2,
        hidden: int = 300,
        means: Sequence[float] = MEANS,
        deviations: float | Sequence[float] = 0.1,
        chunk: int = 40,
        overlap: int = 5,
        window: int = 30,
        stride: int = STRIDE,
        regions: int = 3,
        saturation: Saturation = "embedding",
        robust: bool = False,
        positions: bool = True,
        apart: bool = True,
        reuse: bool = True,
        queries: int = 30,
        documents: int = 2050,
        dropout: float = 0.0,
        pack: bool = True,
        published: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, chunk=chunk)
        require_at_least(0, overlap=overlap)
        self.dim, self.chunk, self.overlap = dim, chunk, overlap
        self.window, self.stride = window, stride
        self.reuse, self.pack, self.published = reuse, pack, published
        self.reader = MixedRepresentation(
            dim,
            heads,
            layers,
            hidden,
            dropout=dropout,
            queries=queries,
            documents=documents,
            positions=positions,
            apart=apart,
        )
        self.saturated = SaturatedWindows(
            dim, means=means, deviations=deviations, saturation=saturation, robust=robust, window=window
        )
        self.top = TopRegions(regions, window=window, stride=stride, published=published)

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        document: Float[Tensor, "batch terms dim"],
        query_mask: Bool[Tensor, "batch queries"],
        document_mask: Bool[Tensor, "batch terms"],
    ) -> Float[Tensor, "batch"]:
        """A score of each pair."""
        return self.scored(query, document, query_mask, document_mask).score

    def scored(
        self,
        query: Float[Tensor, "batch queries dim"],
        document: Float[Tensor, "batch terms dim"],
        query_mask: Bool[Tensor, "batch queries"],
        document_mask: Bool[Tensor, "batch terms"],
    ) -> Scored:
        """The same, with the regions that made it.

        Args:
            query, document: embeddings.
            query_mask, document_mask: True on real terms that have an embedding; a document without any scores 0. A term
                without an embedding keeps its place, so that padding has to stand behind.
        """
        self._check(query, document, query_mask, document_mask)
        query = query.masked_fill(~query_mask.unsqueeze(-1), 0.0)
        document = document.masked_fill(~document_mask.unsqueeze(-1), 0.0)
        told = self.reader(query, query_mask)
        chunks = chunked(document, document_mask, self.chunk, self.overlap, self.published)
        read, real = self._read(chunks)
        similarity = cosine(told, read)
        activation = kernels(similarity, self.saturated.means, self.saturated.deviations)
        activation = activation * real[:, None, :, None]
        windows = windowed(activation, real, self.window, self.stride, self.published)
        regions = self.top(self.saturated(windows, told, query_mask))
        packed = int(chunks.kept.sum()) if self.pack else chunks.kept.numel()
        return Scored(regions.score, regions, chunks.kept.numel(), packed)

    def spans(self, tops: Int[Tensor, "batch regions"], terms: int) -> list[list[tuple[int, int]]]:
        """First and last term, and one more, of each chosen window; those that were not chosen are left out.

        Args:
            tops: of `Regions`.
            terms: in a document; a window ends there.
        """
        starts = [[int(top) * self.stride for top in row if int(top) >= 0] for row in tops.tolist()]
        return [[(a, min(a + self.window, terms)) for a in row if a < terms] for row in starts]

    def _read(self, chunks: Chunks) -> tuple[Float[Tensor, "batch terms dim"], Bool[Tensor, "batch terms"]]:
        """Terms of the cores in context, and which are real; chunks without a real one are not run."""
        core = slice(self.overlap, self.overlap + self.chunk)
        batch, count = chunks.kept.shape
        run = chunks.kept if self.pack else torch.ones_like(chunks.kept)
        starts = None
        if not self.reuse:
            starts = (torch.arange(count, device=run.device) * self.chunk).expand(batch, -1)[run]
        read = self.reader(chunks.x[run], chunks.mask[run], document=True, starts=starts)[:, core]
        # scattered back; what was not run is zeros
        places = run.flatten().nonzero().squeeze(1)
        whole = chunks.x.new_zeros(batch * count, self.chunk, self.dim).index_copy(0, places, read)
        return whole.view(batch, count * self.chunk, self.dim), chunks.mask[:, :, core].flatten(1)

    def _check(self, query: Tensor, document: Tensor, query_mask: Tensor, document_mask: Tensor) -> None:
        for name, x, mask in (("query", query, query_mask), ("document", document, document_mask)):
            if x.dim() != 3 or x.shape[2] != self.dim or not x.shape[1]:
                raise InputError(f"{name}: expected [batch, terms, {self.dim}], at least one term, got {list(x.shape)}")
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                raise InputError(
                    f"{name}_mask: expected bool {list(x.shape[:2])} as the terms, got {mask.dtype} {list(mask.shape)}"
                )
        if len(query) != len(document):
            raise InputError(f"document: expected one for each of {len(query)} queries, got {len(document)}")
