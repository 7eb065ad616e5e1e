"""From texts to a ranking with its reasons: embeddings of terms, training on triples, reranking of candidates.

Source: Hofstätter et al. (2020), arXiv 2005.04908.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from cenote.core import InputError
from cenote.core.requirements import require_at_least, require_one_of, require_positive
from cenote.mix.fitting import Fitted, fit
from cenote.mix.local_attention_tkl.model import TKL, Scored
from cenote.mix.local_attention_tkl.terms import BM25, FIRST, PAD, TermVocabulary, terms_of

Loss = Literal["margin", "ranknet"]
NOT_RANKED = -np.inf


class TKLRanker(nn.Module):
    """Scores of query and document terms: a trained table of embeddings under `TKL`, or another scorer called as that is.

    Args:
        terms: how many numbers a `TermVocabulary` has.
        dim: width of the embeddings; that of `table` where there is one.
        table: embeddings to begin with, such as GloVe's, `[terms, dim]`.
        scorer: of embeddings; a `TKL` of the settings by default.
        query, document: so many terms are read of each.
        settings: of `TKL`.

    Example:
        >>> ranker = TKLRanker(50, 8, heads=2, layers=1, hidden=8)
        >>> ranker(torch.tensor([[3, 4]]), torch.tensor([[5, 3, 4, 6]])).shape
        torch.Size([1])

    Source: Hofstätter et al. (2020), arXiv 2005.04908.
    """

    def __init__(
        self,
        terms: int,
        dim: int = 300,
        *,
        table: Float[Tensor, "terms dim"] | None = None,
        scorer: nn.Module | None = None,
        query: int = 30,
        document: int = 2000,
        **settings: Any,
    ) -> None:
        super().__init__()
        require_at_least(FIRST + 1, terms=terms)
        require_at_least(1, query=query, document=document)
        if table is not None and len(table) != terms:
            raise InputError(f"table: expected {terms} rows as the vocabulary has numbers, got {len(table)}")
        dim = dim if table is None else table.shape[1]
        # gradients of the few terms of a batch alone
        self.embedding = nn.Embedding(terms, dim, padding_idx=PAD, sparse=True)
        if table is not None:
            with torch.no_grad():
                self.embedding.weight.copy_(table)
        if scorer is not None and settings:
            raise InputError(f"settings: {', '.join(settings)} are of TKL, and another scorer is given")
        self.scorer = TKL(dim, queries=query, **settings) if scorer is None else scorer
        self.query, self.document = query, document

    def forward(
        self, query: Int[Tensor, "batch queries"], document: Int[Tensor, "batch terms"]
    ) -> Float[Tensor, "batch"]:
        """A score of each pair of rows of numbers; terms that are not known count nothing."""
        return self.scorer(*self._embedded(query, document))

    def scored(self, query: Int[Tensor, "batch queries"], document: Int[Tensor, "batch terms"]) -> Scored:
        """The same, with the regions that made it.

        Raises:
            InputError: of another scorer, which has none.
        """
        if not isinstance(self.scorer, TKL):
            raise InputError(f"scorer: {type(self.scorer).__name__} finds no regions; TKL does")
        return self.scorer.scored(*self._embedded(query, document))

    def _embedded(self, query: Tensor, document: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, document = query[:, : self.query], document[:, : self.document]
        return self.embedding(query), self.embedding(document), query >= FIRST, document >= FIRST


class Triples(NamedTuple):
    """Numbers of the terms of queries, of documents that answer them, and of others, padded behind."""

    query: Int[Tensor, "items queries"]
    relevant: Int[Tensor, "items terms"]
    other: Int[Tensor, "items others"]


def pair_loss(
    relevant: Float[Tensor, "items"], other: Float[Tensor, "items"], loss: Loss = "margin"
) -> Float[Tensor, ""]:
    """`max(0, 1 - (s+ - s-))`, or RankNet's `log(1 + exp(s- - s+))`, mean over the items.

    >>> pair_loss(torch.tensor([2.0]), torch.tensor([0.5])).item()
    0.0
    """
    require_one_of(get_args(Loss), loss=loss)
    ahead = relevant - other
    return (1 - ahead).clamp(min=0).mean() if loss == "margin" else F.softplus(-ahead).mean()


def train_ranker(
    model: TKLRanker,
    triples: Triples,
    validate: Callable[[], float] | None = None,
    *,
    loss: Loss = "margin",
    epochs: int = 1,
    batch: int = 32,
    lr: float = 1e-5,
    kernel_lr: float = 1e-4,
    embedding_lr: float = 1e-4,
    patience: int | None = None,
    random_state: int = 0,
) -> Fitted:
    """Train on pairs of documents with Adam, rates as published; embeddings with sparse Adam.

    Args:
        model: trained in place, left in eval mode.
        triples: to train on.
        validate: a metric of validation queries after each epoch; the best is kept.
        loss: see `pair_loss`.
        epochs, batch: as usual.
        lr: of the contextualizer and what else reads terms.
        kernel_lr: of the kernels' weights, saturation, regions and the share of context.
        embedding_lr: of the embeddings; 0 to leave them. A table that begins at random wants more than is published.
        patience: epochs without a better metric behind which it ends.
        random_state: of order and dropout.

    Example:
        >>> texts, queries = ["heat in wings", "birds and wings"], ["heat wings"]
        >>> vocabulary = TermVocabulary.of(texts)
        >>> ranker = TKLRanker(len(vocabulary), 8, heads=2, layers=1, hidden=8)
        >>> triples = triples_of(queries, texts, [{0: 1.0}], vocabulary)
        >>> len(train_ranker(ranker, triples, epochs=2).losses)
        2
    """
    require_positive(lr=lr, kernel_lr=kernel_lr)
    require_at_least(0, embedding_lr=embedding_lr)
    if not len(triples.query) == len(triples.relevant) == len(triples.other):
        raise InputError(
            f"triples: expected as many queries, relevant and other documents, got {[len(part) for part in triples]}"
        )
    reading: list[nn.Parameter] = []
    kernels: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.startswith("embedding."):
            parameter.requires_grad_(embedding_lr > 0)
            continue
        deep = name.startswith("scorer.reader.") and not name.endswith("mixer")
        (reading if deep else kernels).append(parameter)
    groups = [{"params": part, "lr": rate} for part, rate in ((reading, lr), (kernels, kernel_lr)) if part]
    steppers: list[torch.optim.Optimizer] = [torch.optim.Adam(groups)]
    if embedding_lr:
        steppers.append(torch.optim.SparseAdam(model.embedding.parameters(), lr=embedding_lr))

    def of(chosen: Int[Tensor, "chosen"]) -> Tensor:
        query = triples.query[chosen]
        sides = [model(query, _cut(part[chosen])) for part in (triples.relevant, triples.other)]
        return pair_loss(sides[0], sides[1], loss)

    return fit(
        model,
        len(triples.query),
        of,
        steppers,
        epochs=epochs,
        batch=batch,
        score=validate,
        patience=patience,
        random_state=random_state,
    )


def triples_of(
    queries: Sequence[str],
    documents: Sequence[str],
    gains: Sequence[dict[int, float]],
    vocabulary: TermVocabulary,
    *,
    candidates: int = 100,
    each: int = 8,
    query: int = 30,
    document: int = 2000,
    random_state: int = 0,
) -> Triples:
    """For each judged pair some documents that BM25 finds for the query and that do not answer it.

    Args:
        queries, documents: texts.
        gains: of each query, number of a document -> gain.
        vocabulary: of the model.
        candidates: of BM25, among which others are drawn.
        each: how many others for each document that answers.
        query, document: so many terms of each.
        random_state: of what is drawn.
    """
    rng = np.random.default_rng(random_state)
    found: list[tuple[int, int, int]] = []
    for q, (first, own) in enumerate(zip(BM25(documents).first(queries, candidates), gains, strict=True)):
        others = [d for d in first if own.get(d, 0) <= 0]
        if not others:
            continue
        for d in (d for d, gain in own.items() if gain > 0):
            found += [(q, d, others[i]) for i in rng.integers(len(others), size=each)]
    if not found:
        raise InputError("gains: no query has both a document that answers it and a candidate that does not")
    asked, texts = vocabulary.encode(queries, query), vocabulary.encode(documents, document)
    a, b, c = torch.tensor(found).T
    return Triples(asked[a], texts[b], texts[c])


class Region(NamedTuple):
    """Where a document is relevant: characters from `start` to before `end`, their text, and the window's score."""

    start: int
    end: int
    text: str
    score: float


class Ranked(NamedTuple):
    """A document's number, its score, and its regions, best first; none where the scorer finds none."""

    document: int
    score: float
    regions: tuple[Region, ...]


class Reranker:
    """A collection in, rankings with their reasons out: candidates by BM25, reranked by a trained model.

    Args:
        ranker: in eval mode.
        vocabulary: that its table was made for.
        documents: texts of the collection.
        candidates: how many of BM25 are reranked.
        batch: pairs at a time, of documents of like lengths.

    Example:
        >>> texts = ["heat in wings of aircraft", "birds in spring"]
        >>> vocabulary = TermVocabulary.of(texts)
        >>> reranker = Reranker(TKLRanker(len(vocabulary), 8, heads=2, layers=1, hidden=8), vocabulary, texts)
        >>> [found.document for found in reranker.rank(["heat"])[0]]
        [0]
    """

    def __init__(
        self,
        ranker: TKLRanker,
        vocabulary: TermVocabulary,
        documents: Sequence[str],
        *,
        candidates: int = 100,
        batch: int = 32,
    ) -> None:
        require_at_least(1, candidates=candidates, batch=batch)
        if len(vocabulary) != ranker.embedding.num_embeddings:
            raise InputError(
                f"vocabulary: has {len(vocabulary)} numbers, and the ranker's table {ranker.embedding.num_embeddings} rows"
            )
        self.ranker, self.vocabulary, self.texts = ranker, vocabulary, tuple(documents)
        self.candidates, self.batch = candidates, batch
        self.bm25 = BM25(documents)
        self.documents = vocabulary.encode(documents, ranker.document)
        self.lengths = (self.documents != PAD).sum(1)

    @torch.no_grad()
    def rank(self, queries: Sequence[str], k: int = 10) -> list[list[Ranked]]:
        """The best `k` documents of each query, of its candidates; equal ones in the order of BM25."""
        require_at_least(1, k=k)
        found = []
        for query, first in zip(queries, self.bm25.first(queries, self.candidates), strict=True):
            scores = self._scores(query, first)
            order = scores.argsort(descending=True, stable=True)[:k].tolist()
            best = [(first[i], float(scores[i])) for i in order]
            regions = self._regions(query, [document for document, _ in best])
            found.append([Ranked(d, s, r) for (d, s), r in zip(best, regions, strict=True)])
        return found

    @torch.no_grad()
    def scores(self, queries: Sequence[str]) -> Float[ndarray, "queries documents"]:
        """Of all documents, below every number where one is no candidate: for `cenote.compare.ranking`."""
        found = np.full((len(queries), len(self.texts)), NOT_RANKED)
        for row, query, first in zip(found, queries, self.bm25.first(queries, self.candidates), strict=True):
            row[first] = self._scores(query, first).double().numpy()
        return found

    def _scores(self, query: str, documents: Sequence[int]) -> Float[Tensor, "documents"]:
        asked = self.vocabulary.encode([query], self.ranker.query)
        numbers = torch.tensor(documents, dtype=torch.long)
        order = self.lengths[numbers].argsort()
        found = torch.zeros(len(numbers))
        for part in order.split(self.batch):
            rows = _cut(self.documents[numbers[part]])
            found[part] = self.ranker(asked.expand(len(part), -1), rows).float()
        return found

    def _regions(self, query: str, documents: Sequence[int]) -> list[tuple[Region, ...]]:
        scorer = self.ranker.scorer
        if not isinstance(scorer, TKL) or not documents:
            return [()] * len(documents)
        asked = self.vocabulary.encode([query], self.ranker.query).expand(len(documents), -1)
        regions = self.ranker.scored(asked, _cut(self.documents[list(documents)])).regions
        found = []
        for number, tops, values in zip(documents, regions.tops.tolist(), regions.windows, strict=True):
            terms = terms_of(self.texts[number])[: self.ranker.document]
            own = []
            for top in (t for t in tops if t >= 0 and t * scorer.stride < len(terms)):
                last = min(top * scorer.stride + scorer.window, len(terms)) - 1
                start, end = terms[top * scorer.stride].start, terms[last].end
                own.append(Region(start, end, self.texts[number][start:end], float(values[top])))
            found.append(tuple(own))
        return found


def regions_covered(
    spans: Iterable[Sequence[tuple[int, int]]], planted: Iterable[tuple[int, int]], least: float = 0.5
) -> float:
    """Share of documents of whose planted region at least so much lies in one of the chosen windows.

    Args:
        spans: of each document the windows' first terms and those behind their last, see `TKL.spans`.
        planted: of each document the region's.
        least: share of the region that one window must hold.

    >>> regions_covered([[(0, 30)], [(60, 90)]], [(10, 30), (20, 40)])
    0.5
    """
    found = []
    for own, (start, end) in zip(spans, planted, strict=True):
        inside = max((max(min(b, end) - max(a, start), 0) for a, b in own), default=0)
        found.append(inside >= least * (end - start))
    if not found:
        raise InputError("planted: give at least one region")
    return sum(found) / len(found)


class Cost(NamedTuple):
    """Of documents of a length: CPU seconds of one pass without gradients, and bytes that a pass keeps for its gradients."""

    length: int
    seconds: float
    kept: int


def cost_by_length(
    model: TKL, lengths: Sequence[int] = (500, 1000, 2000), batch: int = 4, repeats: int = 3
) -> tuple[Cost, ...]:
    """Time and memory against the length of documents, of random embeddings.

    Args:
        model: in eval mode.
        lengths: in terms.
        batch: documents at once.
        repeats: of which the quickest counts.
    """
    require_at_least(1, batch=batch, repeats=repeats)
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        query, document = (torch.randn(batch, n, model.dim, generator=generator) for n in (8, length))
        masks = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (query, document)]
        taken = []
        with torch.no_grad():
            for _ in range(repeats):
                start = time.process_time()
                model(query, document, *masks)
                taken.append(time.process_time() - start)
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(query.requires_grad_(), document.requires_grad_(), *masks)
        found.append(Cost(length, min(taken), sum(kept.values())))
    return tuple(found)


def _cut(numbers: Int[Tensor, "batch terms"]) -> Int[Tensor, "batch fewer"]:
    """Without columns behind the longest row."""
    width = int((numbers != PAD).sum(1).max()) if len(numbers) else 0
    return numbers[:, : max(width, 1)]
