"""Texts -> vectors that are kept: what is encoded once is not encoded again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.features.corpora import Texts
from cenote.features.store import StoredTokens
from cenote.features.validate import some
from cenote.features.vectors import ExactStore, Meta, require_vectors

AT_ONCE = 256
"""Documents between two writes: what a killed run loses."""


@runtime_checkable
class Encoder(Protocol):
    """What turns texts into vectors: `cenote.models.token_vectors.TokenEncoder`, or your own.

    Attributes:
        name: that queries' model can be loaded by.
        weights: SHA-256 of its weights, empty where it has none.
        width: of a vector.
        protect: leading vectors of a document that reductions leave as they are.
        layer: hidden state; `None`: the output.
        punctuation: whether documents keep its vectors.
        max_length: at which texts are cut.
    """

    name: str
    weights: str
    width: int
    protect: int
    layer: int | None
    punctuation: bool
    max_length: int | None

    def documents(self, texts: Sequence[str]) -> Bags:
        """Unit-norm vectors of each text."""

    def queries(self, texts: Sequence[str]) -> Bags:
        """Unit-norm vectors of each query."""


def meta_of(encoder: Encoder, method: str = "unreduced", factor: float = 1.0, unit_norm: bool = True) -> Meta:
    """What an index of an encoder's vectors says of itself."""
    return Meta(
        encoder.name,
        encoder.width,
        method,
        factor,
        unit_norm,
        encoder.weights,
        encoder.layer,
        encoder.punctuation,
        encoder.max_length,
    )


def encoded(
    texts: Texts, encoder: Encoder, folder: Path, on_done: Callable[[int], None] = lambda _: None
) -> ExactStore:
    """All vectors of documents, in a folder of their own below one; what is there of the same texts and model stays.

    Args:
        texts: of the documents.
        encoder: see `Encoder`.
        folder: where they are kept; of those of other texts only the latest stay.
        on_done: called with how many are done.
    """
    meta = meta_of(encoder)
    digest = hashlib.sha256(repr((meta, texts)).encode("utf-8", "backslashreplace")).hexdigest()
    store = kept(folder, digest, meta)
    for start in range(0, len(texts.ids), AT_ONCE):
        ids = texts.ids[start : start + AT_ONCE]
        new = set(store.missing(ids))
        if new:
            named = [(name, text) for name, text in zip(ids, texts.texts[start:], strict=False) if name in new]
            store.add([name for name, _ in named], encoder.documents([text for _, text in named]))
        on_done(min(start + AT_ONCE, len(texts.ids)))
    return store


def stored(ids: Sequence[str], bags: Bags, folder: Path, meta: Meta) -> ExactStore:
    """The same of vectors that are there already, scaled to norm 1.

    Raises:
        InputError: where a document has no vector, or one that is zero, NaN or infinite.
    """
    bags = directions(ids, bags, "documents")
    require_vectors(ids, bags, meta)
    digest = hashlib.sha256(repr((meta, list(ids), bags.offsets.tolist())).encode("utf-8", "backslashreplace"))
    digest.update(_bytes(bags.values))
    store = kept(folder, digest.hexdigest(), meta)
    store.add(ids, bags)
    return store


def directions(ids: Sequence[str], bags: Bags, what: str) -> Bags:
    """Vectors scaled to norm 1.

    Raises:
        InputError: where one is zero, NaN or infinite, naming its document.
    """
    values = bags.values.float()
    norms = values.norm(dim=1, keepdim=True)
    bad = ~(norms.isfinite() & (norms > 0)).squeeze(1)
    if bool(bad.any()):
        names = [ids[i] for i in bags.set_index()[bad].unique().tolist()]
        raise InputError(
            f"{what}: {int(bad.sum()):,} of {len(values):,} vectors are zero, NaN or infinite, in {some(names)}; leave them out"
        )
    return Bags(values / norms, bags.offsets)


def of_features(documents: StoredTokens, queries: StoredTokens) -> tuple[Bags, Bags]:
    """Token features that were extracted before, as vectors of documents and queries: of their last common layer.

    Raises:
        InputError: where they are of two models, or were pooled.
    """
    for what, store in (("documents", documents), ("queries", queries)):
        if store.manifest.pooled is not None:
            raise InputError(
                f"{what}: {store.folder} holds one vector per item ({store.manifest.pooled}); extract all tokens"
            )
    if documents.manifest.model != queries.manifest.model:
        raise InputError(
            f"queries: {queries.folder} is of another model than {documents.folder}; extract both with one"
        )
    common = sorted(set(documents.manifest.layers) & set(queries.manifest.layers))
    if not common:
        raise InputError(
            f"queries: {queries.folder} has none of the layers of {documents.folder}; extract the same ones"
        )

    def bags(store: StoredTokens) -> Bags:
        return Bags.from_list([store.item(i, common[-1]).float() for i in range(len(store))])

    return bags(documents), bags(queries)


def digest_of(bags: Bags) -> str:
    """That changes with the vectors."""
    return hashlib.sha256(repr(bags.offsets.tolist()).encode() + _bytes(bags.values)).hexdigest()


def kept(folder: Path, digest: str, meta: Meta) -> ExactStore:
    """The store of a digest in a folder, where of others only the latest stays: whoever goes back to it loses nothing."""
    own = folder / digest[:16]
    others = [other for other in folder.glob("*") if other != own] if folder.is_dir() else []
    for other in sorted(others, key=lambda path: path.stat().st_mtime)[:-1]:
        shutil.rmtree(other, ignore_errors=True)
    return ExactStore(own, meta)


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().flatten().view(torch.uint8).numpy().tobytes()
