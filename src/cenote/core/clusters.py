"""Clusters of small sets of vectors: trees by Ward's linkage, which one pays for once and cuts many times, and k-means."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from torch import Tensor

from cenote.core.segments import accumulation_dtype


def cosine_distances(x: Float[Tensor, "n dim"]) -> Float[Tensor, "n n"]:
    """`1 - x_i . x_j` of vectors of unit length."""
    return 1 - x @ x.T


def ward_tree(distances: Float[Tensor, "n n"], *, rows: bool = False) -> NDArray[np.float64]:
    """The tree of Ward's linkage, as scipy's `linkage` gives it, of two or more vectors.

    Args:
        distances: between the vectors, symmetric.
        rows: take each row for an observation, so that vectors with like distances to all others come together, not vectors
            that are near each other.
    """
    table = distances.detach().cpu().numpy()
    if rows:
        return np.asarray(hierarchy.linkage(table, metric="euclidean", method="ward"))
    # distances of all but equal vectors come out below zero by rounding
    return np.asarray(hierarchy.linkage(np.maximum(table.ravel()[_above(len(table))], 0.0), method="ward"))


def cut(tree: NDArray[np.float64], clusters: int) -> NDArray[np.int64]:
    """The cluster of each vector, from 0: at most so many, fewer where heights of the tree are tied."""
    labels = hierarchy.fcluster(tree, max(clusters, 1), criterion="maxclust")
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


@lru_cache(maxsize=512)
def _above(n: int) -> NDArray[np.int64]:
    """Flat places of what stands above the diagonal of an `n x n` table."""
    rows, columns = np.triu_indices(n, 1)
    return rows * n + columns


def cosine_kmeans(
    x: Float[Tensor, "batch tokens dim"],
    counts: Int[Tensor, "batch"],
    mask: Bool[Tensor, "batch tokens"],
    *,
    iterations: int = 20,
    seed: int = 0,
) -> Int[Tensor, "batch tokens"]:
    """Lloyd's algorithm with cosine similarities, from centres that are random vectors of the set.

    A set's clusters depend on `seed` and on its own vectors alone. A centre that nobody is nearest to stays where it was.

    Args:
        x: the vectors, none of them zero where the mask is True.
        counts: of clusters, at most the vectors of the set.
        mask: True = a real vector.
        iterations: at most; it ends sooner where nothing moves.
        seed: of the first centres.

    Returns:
        The cluster of each vector, -1 for padding; clusters may be empty.
    """
    most = int(counts.max()) if counts.numel() else 0
    assignment = torch.full(mask.shape, -1, dtype=torch.long, device=x.device)
    if not most:
        return assignment
    unit = torch.nn.functional.normalize(x.detach().to(accumulation_dtype(x.dtype)), dim=-1)
    first = torch.zeros(len(x), most, dtype=torch.long)
    for item, (real, k) in enumerate(zip(mask.cpu(), counts.tolist(), strict=True)):
        own = real.nonzero().squeeze(1)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        first[item, :k] = own[order[:k]]
    centres = unit[torch.arange(len(x), device=x.device)[:, None], first.to(x.device)]
    none = torch.arange(most, device=x.device) >= counts.to(x.device)[:, None]
    for _ in range(iterations):
        near = (unit @ centres.transpose(1, 2)).masked_fill(none[:, None, :], -torch.inf)
        found = near.argmax(-1).masked_fill(~mask, -1)
        if torch.equal(found, assignment):
            break
        assignment = found
        slot = assignment.remainder(most + 1).unsqueeze(-1).expand_as(unit)
        sums = unit.new_zeros(len(x), most + 1, x.shape[2]).scatter_add(1, slot, unit)[:, :most]
        length = sums.norm(dim=-1, keepdim=True)
        centres = torch.where(length > 0, sums / length.clamp(min=torch.finfo(sums.dtype).tiny), centres)
    return assignment
