"""Contrastive training of embeddings: the loss with hard negatives, where these come from, and exact search.

Source: Tang, Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cenote.core.errors import InputError
from cenote.core.requirements import require_at_least, require_positive
from cenote.pool.training import gathered, several_processes

AT_ONCE = 2**24
"""Similarities that search holds at once."""


class Triple(NamedTuple):
    """A query, a passage that answers it, and one that does not, though it looks as if."""

    query: str
    positive: str
    negative: str | None = None


def hard_negative_loss(
    queries: Float[Tensor, "batch dim"],
    positives: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "batch dim"] | None = None,
    scale: float = 50.0,
) -> Float[Tensor, ""]:
    """InfoNCE: of all passages of the batch, hard negatives included, each query shall be nearest to its own.

    `L = -mean_i log softmax_j(scale cos(q_i, d_j))_i`, `d` the positives and the negatives of the whole batch. Where processes
    train together, those of all of them, and gradients flow back to each; their batches must be of one size.

    Args:
        queries: of this process.
        positives: one for each.
        negatives: one hard one for each, or `None`.
        scale: of the cosines.

    Raises:
        InputError: where shapes differ.

    Example:
        >>> from cenote.pool import MultiLayerTrainable
        >>> _ = torch.manual_seed(0)
        >>> pool = MultiLayerTrainable(8, layers=4, latents=4, heads=2, head_dim=4)
        >>> adam = torch.optim.AdamW(pool.parameters(), lr=0.01)
        >>> queries = torch.randn(6, 4, 5, 8)
        >>> positives, negatives = queries + 0.3 * torch.randn(6, 4, 5, 8), torch.randn(6, 4, 5, 8)
        >>> losses = []
        >>> for _ in range(30):
        ...     loss = hard_negative_loss(pool(queries), pool(positives), pool(negatives))
        ...     adam.zero_grad(); loss.backward(); adam.step(); losses.append(loss.item())
        >>> losses[-1] < 0.5 * losses[0]
        True

    Source: the authors' `HardNegativeNLLLoss`, of Tang, Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based
    Embedding Models?", 2024.
    """
    require_positive(scale=scale)
    for name, given in (("positives", positives), ("negatives", negatives)):
        if given is not None and given.shape != queries.shape:
            raise InputError(f"{name}: expected shape {tuple(queries.shape)} as queries, got {tuple(given.shape)}")
    own = len(queries)
    passages = [gathered(side) for side in (positives, negatives) if side is not None]
    scores = scale * F.normalize(queries, dim=-1) @ F.normalize(torch.cat(passages), dim=-1).T
    first = _rank() * own
    return F.cross_entropy(scores, torch.arange(first, first + own, device=queries.device))


class Nearest(NamedTuple):
    """The passages that are nearest to each query.

    Attributes:
        indices: `[queries, k]`, nearest first.
        cosines: likewise.
    """

    indices: Int[Tensor, "queries k"]
    cosines: Float[Tensor, "queries k"]


def nearest(queries: Float[Tensor, "queries dim"], passages: Float[Tensor, "passages dim"], k: int = 10) -> Nearest:
    """Exact cosine search, some queries at a time.

    Args:
        queries, passages: vectors.
        k: how many; fewer where there are not as many passages.

    Raises:
        InputError: where widths differ, or there is no passage.

    Example:
        >>> nearest(torch.eye(2), torch.tensor([[0.0, 2.0], [3.0, 0.1], [1.0, 1.0]]), k=2).indices.tolist()
        [[1, 2], [0, 2]]
    """
    require_at_least(1, k=k)
    if queries.shape[1:] != passages.shape[1:] or not len(passages):
        raise InputError(
            f"passages: expected vectors of width {queries.shape[-1]}, at least one, got shape {tuple(passages.shape)}"
        )
    sides = F.normalize(queries, dim=-1), F.normalize(passages, dim=-1)
    rows = max(1, AT_ONCE // len(passages))
    parts = [(part @ sides[1].T).topk(min(k, len(passages)), dim=1) for part in sides[0].split(rows)]
    return Nearest(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))


def mined_negatives(
    queries: Float[Tensor, "queries dim"],
    passages: Float[Tensor, "passages dim"],
    positives: Sequence[int] | Sequence[Sequence[int]],
    skip: int = 0,
) -> Int[Tensor, "queries"]:
    """For each query the nearest passage that does not answer it.

    Args:
        queries, passages: vectors, of any encoder.
        positives: of each query the number of its passage, or the numbers of all that answer it.
        skip: so many nearest ones are left out besides, which may be answers that nobody marked.

    Raises:
        InputError: where a query has no passage left.

    Example:
        >>> mined_negatives(torch.eye(2), torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.0, 1.0]]), [0, 2]).tolist()
        [1, 1]
    """
    require_at_least(0, skip=skip)
    if len(positives) != len(queries):
        raise InputError(f"positives: expected one for each of {len(queries)} queries, got {len(positives)}")
    answers = [{p} if isinstance(p, int) else set(p) for p in positives]
    most = max((len(a) for a in answers), default=0) + skip + 1
    found = nearest(queries, passages, most).indices.tolist()
    left = [[i for i in row if i not in own][skip:] for row, own in zip(found, answers, strict=True)]
    if not all(left):
        raise InputError(f"passages: expected more than {most - 1}, so that each query has one that does not answer it")
    return torch.tensor([row[0] for row in left])


def read_triples(path: str | Path) -> list[Triple]:
    """Triples from a file with a JSON object per line: `query`, `positive`, and, where there is one, `negative`.

    Raises:
        InputError: where there is no such file, or a line is not so, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"path: there is no file {path}")
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
            triple = Triple(said["query"], said["positive"], said.get("negative"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"path: expected an object with query and positive in line {number} of {path}") from error
        if not all(isinstance(text, str) for text in triple[:2]) or not isinstance(triple.negative, str | None):
            raise InputError(f"path: expected texts in line {number} of {path}")
        found.append(triple)
    return found


def _rank() -> int:
    return torch.distributed.get_rank() if several_processes() else 0
