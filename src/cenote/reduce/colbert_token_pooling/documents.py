"""Documents of token vectors -> fewer vectors, as the released implementations and their kin do it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import joblib
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cenote.core import Bags, InputError
from cenote.core.clusters import cosine_distances, cosine_kmeans, cut, ward_tree
from cenote.core.reduced import merged
from cenote.core.requirements import require_at_least, require_one_of
from cenote.reduce.base import Budget

METHODS = ("hierarchical", "kmeans", "sequential")
UNIT = 1e-2
"""How far from 1 a length may be: half precision is nearer."""


@dataclass(frozen=True)
class Variant:
    """What the libraries that pool hierarchically do differently.

    Attributes:
        rows: the linkage is given the square table of distances, whose rows it takes for points, not the distances.
        rounding: of tokens by factor.
        protected: how many first tokens stay as they are.
        counted: whether these count among the tokens that are divided by the factor.
        protected_last: whether they come behind the pooled ones.
        unit_norm: whether means are brought back to unit length.
    """

    rows: bool = False
    rounding: Literal["floor", "ceil"] = "floor"
    protected: int = 1
    counted: bool = False
    protected_last: bool = False
    unit_norm: bool = False


VARIANTS = {
    "pylate": Variant(),
    "colbert": Variant(rows=True, protected=0, counted=True, protected_last=True),
    "pylate-1.3.4": Variant(rows=True),
    "sentence-transformers": Variant(unit_norm=True),
    "colpali": Variant(rows=True, protected=0, unit_norm=True),
    "vespa": Variant(rounding="ceil", unit_norm=True),
}
"""By library: `pylate` is also sentence-transformers before 6.3, `pylate-1.3.4` all of PyLate up to that release."""


def variant_of(name: str) -> Variant:
    """Raises `InputError` for a name that there is not."""
    require_one_of(VARIANTS, variant=name)
    return VARIANTS[name]


class PooledDocument(NamedTuple):
    """The vectors that are left, and for each vector of the document the one that it went to."""

    vectors: Float[Tensor, "left dim"]
    assignment: Int[Tensor, "tokens"]


def pool_document(
    document: Float[Tensor, "tokens dim"],
    factor: float,
    protected: int | None = None,
    *,
    method: str = "hierarchical",
    variant: str = "pylate",
    unit_norm: bool | None = None,
    seed: int = 0,
) -> PooledDocument:
    """Means of the clusters of a document's vectors, about one for `factor` vectors.

    `y_k = mean_{n in k} x_n`, the clusters those of Ward's linkage on `1 - x_i . x_j`, cut into at most `n / factor`. Clusters
    come in the order of the cut's labels.

    Args:
        document: vectors of unit length. One vector, or as few as are asked for, come back as they are.
        factor: 1 changes nothing.
        protected: first tokens that stay as they are; None for what the variant has (1, [CLS], by default).
        method: `"hierarchical"`, `"kmeans"` (cosine, from random centres), or `"sequential"` (each `factor` tokens in turn).
        variant: which library's hierarchical pooling, see `VARIANTS`.
        unit_norm: bring means back to unit length; None for what the variant does. Without it a pooled vector scores the mean
            of what its members score, never more than the best of them.
        seed: of `kmeans`.

    Raises:
        InputError: for vectors that are zero, NaN or infinite, by their numbers, and impossible settings.

    Source:
        Clavié, Chaffin, Adams 2024, arXiv 2409.14683; PyLate `pool_embeddings_hierarchical`.
    """
    known = variant_of(variant)
    require_one_of(METHODS, method=method)
    protected = known.protected if protected is None else protected
    require_at_least(0, protected=protected)
    budget = Budget(factor=factor, rounding=known.rounding)
    _require_vectors(document)
    tokens = len(document)
    pooled = document[protected:]
    count = int(budget.of(torch.tensor([tokens if known.counted else len(pooled)])))
    if len(pooled) <= 1 or count >= len(pooled):
        return PooledDocument(document, torch.arange(tokens, device=document.device))
    labels = _labels(pooled, method, count, factor, known.rows, seed).to(document.device)
    means = merged(pooled[None], labels[None], int(labels.max()) + 1)
    vectors = means.tokens[0]
    if known.unit_norm if unit_norm is None else unit_norm:
        vectors = unit_means(vectors, means.sizes[0])
    kept = torch.arange(min(protected, tokens), device=document.device)
    if known.protected_last:
        return PooledDocument(torch.cat([vectors, document[:protected]]), torch.cat([kept + len(vectors), labels]))
    return PooledDocument(torch.cat([document[:protected], vectors]), torch.cat([kept, labels + len(kept)]))


def pool_documents(
    documents: Sequence[Float[Tensor, "_ dim"]] | Bags,
    factor: float,
    protected: int | None = None,
    *,
    workers: int = 1,
    **settings: object,
) -> tuple[Bags, tuple[Int[Tensor, "_"], ...]]:
    """`pool_document` of each document, on its own.

    Args:
        documents: a list of `[tokens, dim]`, or `Bags` of them; empty ones stay empty.
        factor, protected, settings: as `pool_document`.
        workers: processes that share the documents.

    Returns:
        The pooled documents, and each one's assignment.

    Source:
        Clavié, Chaffin, Adams 2024, arXiv 2409.14683; PyLate and ColBERT, which pool a list of documents.
    """
    bags = documents if isinstance(documents, Bags) else Bags.from_list(documents)
    require_at_least(1, workers=workers)
    given = {"factor": factor, "protected": protected, **settings}
    if workers == 1:
        pooled = [pool_document(d, **given) for d in bags]  # type: ignore[arg-type]
    else:
        pooled = joblib.Parallel(workers)(joblib.delayed(pool_document)(d.clone(), **given) for d in bags)
    return Bags.from_list([p.vectors for p in pooled]), tuple(p.assignment for p in pooled)


def real_documents(
    x: Float[Tensor, "batch tokens dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    ids: Int[Tensor, "batch tokens"] | None = None,
    skipped: Collection[int] = (),
) -> Bags:
    """The token vectors that an index holds: without padding, and without tokens of some vocabulary numbers, such as
    punctuation."""
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
    if skipped:
        if ids is None:
            raise InputError("ids: expected the vocabulary numbers of the tokens, by which some are skipped")
        real = real & ~torch.isin(ids, torch.tensor(sorted(skipped), device=ids.device))
    return Bags.from_padded(x, real)


def unit_means(
    means: Float[Tensor, "*sets left dim"], sizes: Float[Tensor, "*sets left"]
) -> Float[Tensor, "*sets left dim"]:
    """Means brought to unit length; what stands for one vector alone stays as it is."""
    alone = (sizes <= 1).unsqueeze(-1)
    return torch.where(alone, means, torch.nn.functional.normalize(means, dim=-1))


def _labels(
    x: Float[Tensor, "tokens dim"], method: str, count: int, factor: float, rows: bool, seed: int
) -> Int[Tensor, "tokens"]:
    if method == "sequential":
        return sequential_labels(len(x), factor).to(x.device)
    if method == "kmeans":
        mask = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
        found = cosine_kmeans(x[None], torch.tensor([count]), mask, seed=seed)[0]
        return found.unique(return_inverse=True)[1]  # empty clusters have no vector
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.from_numpy(cut(ward_tree(cosine_distances(wide), rows=rows), count))


def sequential_labels(tokens: int, factor: float) -> Int[Tensor, "tokens"]:
    """The group of each token, where each `factor` tokens in turn are one; the last may be smaller.

    >>> sequential_labels(5, 2).tolist(), sequential_labels(6, 1.5).tolist()
    ([0, 0, 1, 1, 2], [0, 0, 1, 2, 2, 3])
    """
    return (torch.arange(tokens, dtype=torch.float64) / factor).mul(1e9).round().div(1e9).floor().long()


def _require_vectors(document: Tensor) -> None:
    if document.dim() != 2 or not document.is_floating_point():
        raise InputError(
            f"document: expected floating point [tokens, dim], got {document.dtype} {list(document.shape)}"
        )
    bad = ~document.isfinite().all(1) | (document == 0).all(1)
    if bool(bad.any()):
        numbers = bad.nonzero().squeeze(1).tolist()
        raise InputError(
            f"document: {len(numbers)} of {len(document)} vectors are zero, NaN or infinite (the first is number "
            f"{numbers[0]}); leave padding out first, as real_documents does"
        )
    off = (document.detach().float().norm(dim=1) - 1).abs().amax() if len(document) else 0.0
    if float(off) > UNIT:
        raise InputError(
            f"document: expected vectors of unit length, one is off by {float(off):.3g}; scale them with "
            f"torch.nn.functional.normalize"
        )
