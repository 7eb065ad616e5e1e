"""MaxSim, the score of late interaction, exact over a ragged index: `s(q, d) = sum_i max_j q_i . d_j`.

One product per block of documents, the largest of each document's columns, a sum over each query's rows: nothing is padded, and
beside the index, which may be mapped from a file and of half precision, no more than some 64 MB are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least
from cenote.core.segments import accumulation_dtype
from cenote.core.sets import Bags

DOCUMENTS_AT_ONCE = 64
"""In one product: more of them no longer fit into the caches together with their scores."""

VALUES_AT_ONCE = 5 * 2**20
"""Of the vectors in one product, and of what comes out: 20 MB of float32 each."""

MERGED_AT_ONCE = 4096
"""Documents whose scores are held until the best of them join those of before."""


class Found(NamedTuple):
    """The best documents of each query, best first; of equal ones the lower number.

    `scores` `[queries, k]`; `numbers` `[queries, k]`, of the documents.
    """

    scores: Float[Tensor, "queries k"]
    numbers: Int[Tensor, "queries k"]


@torch.no_grad()
def maxsim(queries: Bags, documents: Bags) -> Float[Tensor, "queries documents"]:
    """`s(q, d) = sum_i max_j q_i . d_j` of each query with each document.

    Args:
        queries: the vectors of each query's tokens.
        documents: of each document's, of any floating dtype; sums are kept in float32, or in float64 where queries are.

    Returns:
        On the queries' device. A document without vectors has `-inf`, a query without vectors 0 with all others.

    Raises:
        InputError: where widths differ.

    Example:
        >>> queries = Bags.from_list([torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
        >>> documents = Bags.from_list([torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 1.0]])])
        >>> maxsim(queries, documents).tolist()
        [[5.0, 2.0]]
    """
    _require_one_width(queries, documents)
    blocks = [scores for _, scores in _blocks(queries, documents)]
    return torch.cat(blocks, 1) if blocks else queries.values.new_zeros((len(queries), 0))


@torch.no_grad()
def search(queries: Bags, documents: Bags, k: int = 10) -> Found:
    """The `k` best documents of each query by `maxsim`, without holding the scores of all of them.

    Args:
        queries, documents: see `maxsim`.
        k: how many; all documents where there are no more.

    Raises:
        InputError: where widths differ, or `k` is below 1.

    Example:
        >>> documents = Bags.from_list([torch.eye(2)[:1], torch.eye(2), torch.eye(2)])
        >>> search(Bags.from_list([torch.eye(2)]), documents, k=2).numbers.tolist()
        [[1, 2]]
    """
    require_at_least(1, k=k)
    _require_one_width(queries, documents)
    best = Found(
        torch.empty((len(queries), 0), dtype=_dtype(queries), device=queries.values.device),
        torch.empty((len(queries), 0), dtype=torch.long, device=queries.values.device),
    )
    held: list[Tensor] = []
    first = 0
    for start, scores in _blocks(queries, documents):
        held.append(scores)
        after = start + scores.shape[1]
        if after - first >= MERGED_AT_ONCE or after == len(documents):
            numbers = torch.arange(first, after, device=scores.device).expand(len(queries), -1)
            best = merged(best, Found(torch.cat(held, 1), numbers), k)
            held, first = [], after
    return best


def merged(first: Found, second: Found, k: int) -> Found:
    """The `k` best of both; of equal ones those of the first.

    >>> one, two = (Found(torch.tensor([[s]]), torch.tensor([[n]])) for s, n in ((1.0, 7), (2.0, 8)))
    >>> merged(one, two, 2).numbers.tolist()
    [[8, 7]]
    """
    scores = torch.cat([first.scores, second.scores], 1)
    numbers = torch.cat([first.numbers, second.numbers], 1)
    ordered, places = scores.sort(dim=1, descending=True, stable=True)
    return Found(ordered[:, :k], numbers.gather(1, places[:, :k]))


def _blocks(queries: Bags, documents: Bags) -> Iterator[tuple[int, Float[Tensor, "queries block"]]]:
    """Scores of some documents after the other, each with the number of the first one."""
    dtype, device = _dtype(queries), queries.values.device
    asked, owner = queries.values.to(dtype), queries.set_index()
    offsets = documents.offsets.tolist()
    rows_at_once = max(1, VALUES_AT_ONCE // max(documents.dim, 1))
    room = torch.empty(0, dtype=dtype, device=device)
    start = 0
    while start < len(documents):
        end = start + 1
        while (
            end < min(start + DOCUMENTS_AT_ONCE, len(documents)) and offsets[end + 1] - offsets[start] <= rows_at_once
        ):
            end += 1
        found = torch.zeros((len(queries), end - start), dtype=dtype, device=device)
        tops = torch.full((len(asked), end - start), float("-inf"), dtype=dtype, device=device)
        # a document that is longer than what is taken at once comes alone, in pieces
        for low in range(offsets[start], offsets[end], rows_at_once):
            high = min(low + rows_at_once, offsets[end])
            vectors, room = _as(documents.values[low:high], room, dtype, device)
            lengths = [high - low] if end == start + 1 else [b - a for a, b in pairwise(offsets[start : end + 1])]
            _raise_to_largest(tops, asked, vectors, lengths)
        found.index_add_(0, owner, tops)
        # an empty document is no answer, also to a query that asks nothing
        yield start, found.masked_fill_(documents.lengths()[start:end].to(device) == 0, float("-inf"))
        start = end


def _raise_to_largest(tops: Tensor, asked: Tensor, vectors: Tensor, lengths: list[int]) -> None:
    """Of each asked vector and each document the largest product, where it is larger than what stands there."""
    step = max(1, VALUES_AT_ONCE // max(len(vectors), 1))
    for low in range(0, len(asked), step):
        products = asked[low : low + step] @ vectors.T
        largest = [
            part.amax(1) if part.shape[1] else products.new_full((len(products),), float("-inf"))
            for part in products.split(lengths, 1)
        ]
        part = tops[low : low + step]
        torch.maximum(part, torch.stack(largest, 1), out=part)


def _as(rows: Tensor, room: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows in a dtype, in a room that is used again: fresh memory for each block costs more than the conversion."""
    if rows.dtype == dtype and rows.device == device:
        return rows, room
    if room.numel() < rows.numel():
        room = torch.empty(rows.numel(), dtype=dtype, device=device)
    return room[: rows.numel()].view(rows.shape).copy_(rows), room


def _dtype(queries: Bags) -> torch.dtype:
    return accumulation_dtype(queries.values.dtype)


def _require_one_width(queries: Bags, documents: Bags) -> None:
    if queries.dim != documents.dim:
        raise InputError(
            f"queries: are {queries.dim} wide and documents {documents.dim}; both must come from one model and layer"
        )
