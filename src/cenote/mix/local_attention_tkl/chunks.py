"""A document in overlapping chunks, each read by itself.

Source: Hofstätter et al. (2020), arXiv 2005.04908.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least

SPREAD = 1e4
"""Longest wave of the sinusoids that positions start from."""


class Chunks(NamedTuple):
    """A batch of documents in chunks.

    Attributes:
        x: `[batch, chunks, extended, dim]`, `extended = size + 2 overlap`.
        mask: True on real terms, `[batch, chunks, extended]`.
        kept: which have a real term in their core, and are run, `[batch, chunks]`.
    """

    x: Float[Tensor, "batch chunks extended dim"]
    mask: Bool[Tensor, "batch chunks extended"]
    kept: Bool[Tensor, "batch chunks"]


def chunked(
    x: Float[Tensor, "batch terms dim"],
    mask: Bool[Tensor, "batch terms"],
    size: int = 40,
    overlap: int = 5,
    published: bool = False,
) -> Chunks:
    """Documents cut into cores of `size` terms, each with `overlap` terms of its neighbours on both sides.

    Args:
        x: terms.
        mask: True on real ones.
        size, overlap: of the chunks.
        published: as many chunks as in the authors' code, where the last terms may stand in no core (up to `overlap - 1` of
            them).

    >>> chunked(torch.zeros(1, 100, 2), torch.ones(1, 100, dtype=torch.bool)).x.shape
    torch.Size([1, 3, 50, 2])
    """
    require_at_least(1, size=size)
    require_at_least(0, overlap=overlap)
    extended, terms = size + 2 * overlap, x.shape[1]
    if published:
        behind = extended - (terms - overlap) % size if terms > overlap else extended - overlap - terms
    else:
        behind = max(math.ceil(terms / size), 1) * size + overlap - terms
    x = F.pad(x, (0, 0, overlap, behind))
    mask = F.pad(mask, (overlap, behind), value=False)
    parts = x.unfold(1, extended, size).transpose(2, 3)
    real = mask.unfold(1, extended, size)
    return Chunks(parts, real, real[..., overlap : overlap + size].any(-1))


def sinusoids(count: int, dim: int, start: int = 0) -> Float[Tensor, "count dim"]:
    """Positions from `start` on: sines in the first half of the width, cosines in the second.

    >>> sinusoids(1, 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    waves = max(dim // 2, 1)
    rates = torch.exp(-math.log(SPREAD) / max(waves - 1, 1) * torch.arange(waves))
    angles = torch.arange(start, start + count)[:, None] * rates
    both = torch.cat([angles.sin(), angles.cos()], -1)
    return F.pad(both, (0, max(dim - both.shape[1], 0)))[:, :dim]


class MixedRepresentation(nn.Module):
    """`(m x + (1 - m) Encoder(x + positions)) mask`: of each term how much it is itself, and how much its neighbours.

    One encoder serves queries and documents.

    Args:
        dim: width of the embeddings.
        heads, layers, hidden: of the Transformer encoder, whose norms stand behind each sum.
        dropout: within it.
        queries, documents: how many positions are learned; those of documents start where the sinusoids are at 500, so that
            both differ.
        positions: whether there are any.
        apart: whether those of documents differ from those of queries.

    Example:
        >>> reader = MixedRepresentation(8, heads=2, layers=1, hidden=8)
        >>> reader(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)).shape
        torch.Size([1, 3, 8])

    Source: Hofstätter et al. (2020), arXiv 2005.04908.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 10,
        layers: int = 2,
        hidden: int = 300,
        *,
        dropout: float = 0.0,
        queries: int = 30,
        documents: int = 2050,
        positions: bool = True,
        apart: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, heads=heads, layers=layers, hidden=hidden, queries=queries, documents=documents)
        if dim % heads:
            raise InputError(f"heads: expected to share the width {dim} evenly, got {heads}")
        layer = nn.TransformerEncoderLayer(dim, heads, hidden, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.mixer = nn.Parameter(torch.full((1,), 0.5))
        self.query_positions: nn.Parameter | None = None
        self.document_positions: nn.Parameter | None = None
        if positions:
            self.query_positions = nn.Parameter(sinusoids(queries, dim))
            self.document_positions = nn.Parameter(sinusoids(documents, dim, 500 if apart else 0))

    def forward(
        self,
        x: Float[Tensor, "batch terms dim"],
        mask: Bool[Tensor, "batch terms"],
        document: bool = False,
        starts: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch terms dim"]:
        """Terms that know their neighbours; zeros where the mask is False.

        Args:
            x: embeddings.
            mask: True on real terms.
            document: whose positions are added.
            starts: the first position of each row; 0 by default.
        """
        if not x.numel():
            return x
        x = cleared(x, mask)
        table = self.document_positions if document else self.query_positions
        told = x
        if table is not None:
            last = x.shape[1] + (0 if starts is None else int(starts.max()))
            if last > len(table):
                kind = "documents" if document else "queries"
                raise InputError(f"{kind}: {last} positions are needed, and there are {len(table)}; cut the texts")
            at = torch.arange(x.shape[1], device=x.device)
            told = x + table[at if starts is None else starts[:, None] + at]
        # a row without a real term reads all, and is dropped
        hidden = ~(mask | ~mask.any(1, keepdim=True))
        read = self.encoder(told, src_key_padding_mask=hidden)
        return (self.mixer * x + (1 - self.mixer) * read) * mask.unsqueeze(-1)
