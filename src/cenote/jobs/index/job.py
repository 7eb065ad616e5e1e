"""Put documents into a store, reduced by one method; ask it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cenote.catalog import method
from cenote.core import Bags, InputError
from cenote.features.corpora import Texts
from cenote.features.vectors import Hits, Meta, VectorStore
from cenote.jobs.index.result import Indexed
from cenote.jobs.reduce.arms import BASELINE
from cenote.jobs.reduce.encoding import AT_ONCE, Encoder, meta_of
from cenote.jobs.reduce.pooling import in_batches, reducer_of


def meta_for(encoder: Encoder, name: str = BASELINE, factor: float = 1.0) -> Meta:
    """What a store of an encoder's documents holds, reduced by a method.

    Raises:
        InputError: where there is no such method, or it does not reduce by the factor.
    """
    if name == BASELINE:
        if factor != 1:
            raise InputError(f"factor: unreduced documents keep all vectors; leave factor out, got {factor:g}")
        return meta_of(encoder)
    reducer = reducer_of(name, factor)
    # rows of the input have the norm that they had
    return meta_of(encoder, method(name).name, float(factor), reducer.keeps != "means")


def index(
    texts: Texts, encoder: Encoder, store: VectorStore, on_done: Callable[[int], None] = lambda _: None
) -> Indexed:
    """Encode documents, reduce them as the store says that it holds them, and add them; what is there already is left.

    Killed at any moment, the same call goes on.

    Args:
        texts: names and texts.
        encoder: what turns texts into vectors, the one that the store names.
        store: see `meta_for`.
        on_done: called with how many documents are done.

    Raises:
        InputError: where the store holds vectors of another model, or texts cannot be used.
    """
    held = store.meta
    held.require(meta_for(encoder, held.method, held.factor), "it")
    reducer = None if held.method == BASELINE else reducer_of(held.method, held.factor)
    new = set(store.missing(texts.ids))
    wanted = [(name, text) for name, text in zip(texts.ids, texts.texts, strict=True) if name in new]
    kept = len(texts.ids) - len(wanted)
    before = after = added = 0
    encoding = reducing = adding = 0.0
    for start in range(0, len(wanted), AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        start_encoding = time.perf_counter()
        bags = encoder.documents([text for _, text in some])
        start_reducing = time.perf_counter()
        reduced = bags if reducer is None else in_batches(reducer, bags, encoder.protect)
        start_adding = time.perf_counter()
        added += store.add([name for name, _ in some], reduced)
        encoding += start_reducing - start_encoding
        reducing += start_adding - start_reducing
        adding += time.perf_counter() - start_adding
        before, after = before + len(bags.values), after + len(reduced.values)
        on_done(kept + min(start + AT_ONCE, len(wanted)))
    # a store without an index of its own, as the exact one, has nothing to train
    train = getattr(store, "train", None)
    trained = bool(train()) if train is not None and wanted else False
    return Indexed(held, added, kept, len(store), store.nbytes, before, after, encoding, reducing, adding, trained)


def search(queries: Sequence[str], encoder: Encoder, store: VectorStore, k: int = 10) -> Hits:
    """The `k` best documents of each query.

    Raises:
        InputError: where the store holds vectors of another model.
    """
    held = store.meta
    held.require(meta_of(encoder, held.method, held.factor, held.unit_norm), "it")
    asked = [query for query in queries if query.strip()]
    if len(asked) < len(queries) or not asked:
        raise InputError("queries: expected a text in each of at least one, got none or an empty one")
    return store.search(encoder.queries(asked), k)


def sample_of(queries: Texts, encoder: Encoder, most: int) -> Bags:
    """Vectors of the first so many queries."""
    return encoder.queries(list(queries.texts[:most]))
