"""Other rankers of query and document terms, called as `TKL` is: kernels without context or windows, convolutions, maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cenote.core.masks import cleared
from cenote.core.requirements import require_at_least, require_one_of
from cenote.mix.local_attention_tkl.chunks import MixedRepresentation
from cenote.mix.local_attention_tkl.terms import terms_of
from cenote.mix.local_attention_tkl.windows import LEAST, MEANS, at_least, cosine, kernels

Encode = Callable[[Sequence[str]], Float[Tensor, "texts dim"]]


class KNRM(nn.Module):
    """`w . sum_q log sum_d K(cos(q, d))` on the embeddings (Xiong et al. 2017).

    Args:
        means, deviations: of the kernels.
        first: so many terms of the document alone; None for all.
    """

    def __init__(self, means: Sequence[float] = MEANS, deviations: float = 0.1, first: int | None = None) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(list(means)))
        self.register_buffer("deviations", torch.full((len(means),), deviations))
        self.first = first
        self.dense = nn.Linear(len(means), 1, bias=False)
        nn.init.uniform_(self.dense.weight, -0.014, 0.014)

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        document: Float[Tensor, "batch terms dim"],
        query_mask: Bool[Tensor, "batch queries"],
        document_mask: Bool[Tensor, "batch terms"],
    ) -> Float[Tensor, "batch"]:
        """A score of each pair."""
        document, document_mask = document[:, : self.first], document_mask[:, : self.first]
        return self.dense(self.summed(query, document, query_mask, document_mask)).squeeze(-1)

    def summed(
        self,
        query: Float[Tensor, "batch queries dim"],
        document: Float[Tensor, "batch terms dim"],
        query_mask: Bool[Tensor, "batch queries"],
        document_mask: Bool[Tensor, "batch terms"],
    ) -> Float[Tensor, "batch kernels"]:
        """Logarithms of the sums of kernels, over the query's terms; 0 of a document without any."""
        query, document = cleared(query, query_mask), cleared(document, document_mask)
        sums = self.activated(query, document, document_mask).sum(2)
        logs = torch.log(sums.clamp(min=at_least(LEAST, sums)))
        counts = query_mask & document_mask.any(1, keepdim=True)
        # theirs too: 0.01 keeps the sums near those of the other maps
        return 0.01 * (logs * counts.unsqueeze(-1)).sum(1)

    def activated(self, query: Tensor, document: Tensor, document_mask: Tensor) -> Tensor:
        """Kernels of all pairs, zeros where there is no term, `[batch, queries, terms, kernels]`."""
        found = kernels(cosine(query, document), self.means, self.deviations)  # type: ignore[arg-type]
        return found * document_mask[:, None, :, None]


class ConvKNRM(KNRM):
    """KNRM of n-grams of up to three terms, each length of the query with each of the document (Dai et al. 2018).

    Args:
        dim: width of the embeddings.
        grams: longest n-gram.
        width: of an n-gram's vector.
        means, deviations, first: as of `KNRM`.
    """

    def __init__(
        self,
        dim: int,
        grams: int = 3,
        width: int = 128,
        means: Sequence[float] = MEANS,
        deviations: float = 0.1,
        first: int | None = None,
    ) -> None:
        super().__init__(means, deviations, first)
        require_at_least(1, grams=grams, width=width)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, width, n + 1) for n in range(grams))
        self.dense = nn.Linear(len(means) * grams**2, 1, bias=False)
        nn.init.uniform_(self.dense.weight, -0.014, 0.014)

    def summed(
        self, query: Tensor, document: Tensor, query_mask: Tensor, document_mask: Tensor
    ) -> Float[Tensor, "batch all"]:
        sides = [self._grams(cleared(x, mask)) for x, mask in ((query, query_mask), (document, document_mask))]
        found = [super(ConvKNRM, self).summed(q, d, query_mask, document_mask) for q in sides[0] for d in sides[1]]
        return torch.cat(found, -1)

    def _grams(self, x: Tensor) -> list[Tensor]:
        return [F.relu(c(F.pad(x.mT, (0, c.kernel_size[0] - 1)))).mT for c in self.convolutions]  # type: ignore


class TK(nn.Module):
    """Kernels of terms in context over the whole document, its first terms: no chunks, no windows (Hofstätter et al. 2020).

    `w1 . sum_q log2 sum_d K + w2 . sum_q (sum_d K) / length`, the logarithm as published in TK.

    Args:
        dim, heads, layers, hidden: as of `TKL`.
        first: so many terms of the document.
        means, deviations: of the kernels.
    """

    def __init__(
        self,
        dim: int = 300,
        *,
        heads: int = 10,
        layers: int = 2,
        hidden: int = 300,
        first: int = 200,
        means: Sequence[float] = MEANS,
        deviations: float = 0.1,
    ) -> None:
        super().__init__()
        require_at_least(1, first=first)
        self.first = first
        self.reader = MixedRepresentation(dim, heads, layers, hidden, documents=first)
        self.kernels = KNRM(means, deviations)
        self.by_length = nn.Linear(len(means), 1, bias=False)
        nn.init.uniform_(self.by_length.weight, -0.014, 0.014)

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        document: Float[Tensor, "batch terms dim"],
        query_mask: Bool[Tensor, "batch queries"],
        document_mask: Bool[Tensor, "batch terms"],
    ) -> Float[Tensor, "batch"]:
        """A score of each pair."""
        document, document_mask = document[:, : self.first], document_mask[:, : self.first]
        q, d = self.reader(query, query_mask), self.reader(document, document_mask, document=True)
        sums = self.kernels.activated(q, d, document_mask).sum(2) * query_mask.unsqueeze(-1)
        even = sums.sum(1) / document_mask.sum(1, keepdim=True).clamp(min=1)
        return self.kernels(q, d, query_mask, document_mask) + self.by_length(even).squeeze(-1)


class MatchPyramid(nn.Module):
    """Convolutions on the map of cosines, pooled to a fixed grid (Pang et al. 2016).

    Args:
        channels: of each convolution, 3 x 3.
        grid: rows and columns that the last one is pooled to.
        hidden: between that and the score.
        first: so many terms of the document alone; None for all.
    """

    def __init__(
        self,
        channels: Sequence[int] = (8, 16),
        grid: tuple[int, int] = (5, 10),
        hidden: int = 64,
        first: int | None = None,
    ) -> None:
        super().__init__()
        widths = [1, *channels]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.pool = nn.AdaptiveMaxPool2d(grid)
        self.output = nn.Sequential(nn.Linear(widths[-1] * grid[0] * grid[1], hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.first = first

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        document: Float[Tensor, "batch terms dim"],
        query_mask: Bool[Tensor, "batch queries"],
        document_mask: Bool[Tensor, "batch terms"],
    ) -> Float[Tensor, "batch"]:
        """A score of each pair."""
        document, document_mask = document[:, : self.first], document_mask[:, : self.first]
        query, document = cleared(query, query_mask), cleared(document, document_mask)
        real = (query_mask[:, :, None] & document_mask[:, None])[:, None]
        x = cosine(query, document)[:, None] * real
        for convolution in self.convolutions:
            x = F.relu(convolution(x)) * real
        # of each pair its own map, up to its last terms: padding would stretch the grid
        sizes = zip(_last(query_mask), _last(document_mask), strict=True)
        pooled = torch.stack([self.pool(own[:, :q, :d]) for own, (q, d) in zip(x, sizes, strict=True)])
        return self.output(pooled.flatten(1)).squeeze(-1)


def _last(mask: Bool[Tensor, "batch terms"]) -> list[int]:
    """Behind the last real term of each row; at least 1."""
    numbers = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * numbers).amax(1).clamp(min=1).tolist()


def passages_of(text: str, size: int = 150, step: int = 75) -> list[str]:
    """A text in passages of `size` terms that overlap; at least one.

    >>> passages_of("a b c d e", size=2, step=2)
    ['a b', 'c d', 'e']
    """
    require_at_least(1, size=size, step=step)
    terms = terms_of(text)
    starts = range(0, max(len(terms) - max(size - step, 0), 1), step)
    return [text[terms[i].start : terms[min(i + size, len(terms)) - 1].end] for i in starts] if terms else [text]


def passage_scores(
    encode: Encode,
    query: str,
    documents: Sequence[str],
    which: Literal["first", "max"] = "max",
    *,
    size: int = 150,
    step: int = 75,
) -> Float[Tensor, "documents"]:
    """Cosine of a query with the first passage of each document, or with its best (maxP), by any encoder of texts.

    Args:
        encode: from texts to vectors.
        query: a text.
        documents: texts.
        which: passage.
        size, step: terms of a passage, and between two beginnings.
    """
    require_one_of(("first", "max"), which=which)
    parts = [passages_of(text, size, step)[: 1 if which == "first" else None] for text in documents]
    vectors = F.normalize(encode([part for own in parts for part in own]), dim=-1)
    found = vectors @ F.normalize(encode([query]), dim=-1)[0]
    return torch.stack([own.max() for own in found.split([len(own) for own in parts])])
