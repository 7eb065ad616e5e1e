"""The embedded collection: manual pages of NumPy and SciPy, found by their first sentences."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files as package_files

from cenote.features.corpora import Corpus, Texts, judged

NAME = "manuals"
UNSEEN = 10
"""One page in so many is for testing what learned from the others."""


def manuals(queries: int | None = None) -> Corpus:
    """320 pages of the manuals of NumPy and SciPy, and 200 queries.

    A query is the first sentence of a page, and the document the rest of it, cut at 110 words. The page itself answers with
    gain 2, the pages that its authors list under "See Also" with gain 1. Made by `scripts/build_manuals.py` from docstrings,
    which are under the BSD-3-Clause licence.

    Args:
        queries: only the first so many.

    Example:
        >>> corpus = manuals()
        >>> len(corpus.documents.ids), len(corpus.queries.ids), corpus.queries.texts[0]
        (320, 200, 'Return evenly spaced values within a given interval.')
    """
    raw = json.loads(gzip.decompress((package_files("cenote.features") / "data" / "manuals.json.gz").read_bytes()))
    documents = Texts(tuple(raw["documents"]), tuple(raw["documents"].values()))
    asked = list(raw["queries"])[:queries]
    known = judged(documents.ids, asked, {q: raw["qrels"][q] for q in asked})
    return Corpus(
        NAME, raw["about"], documents, Texts(tuple(asked), tuple(raw["queries"][q] for q in asked)), known.gains
    )


def seen_texts() -> tuple[str, ...]:
    """The pages that embedded models learn from: nine of ten.

    >>> len(seen_texts()), len(unseen_texts()), set(seen_texts()) & set(unseen_texts())
    (288, 32, set())
    """
    return tuple(page for at, page in enumerate(manuals().documents.texts) if at % UNSEEN)


def unseen_texts() -> tuple[str, ...]:
    """The pages that no embedded model has seen: every tenth, from the first."""
    return manuals().documents.texts[::UNSEEN]
