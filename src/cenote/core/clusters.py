"""Clusters of small sets of vectors: trees by Ward's linkage, which one pays for once and cuts many times; and, of many sets
at once, k-means, k-medoids, density peaks, and pairs of like vectors.

Of many sets, `counts` says how many clusters each is to have, at most as many as it has vectors; exactly so many are made, and
none is empty, unless it is said. Among equals the first is taken, and nothing is drawn but by a seed. Gradients reach no
assignment.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from torch import Tensor

from cenote.core.reduced import Reduced, merged, selected
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
    first = drawn(counts, mask, seed)
    centres = unit[torch.arange(len(x), device=x.device)[:, None], first]
    none = _beyond(counts, most)
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


def squared_distances(
    x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens tokens"]:
    """`||x_i - x_j||^2` within each set, in float32 or wider; what is below rounding is zero, so that equal vectors tie."""
    centred = _centred(x, mask)
    return _between(centred, centred)


def drawn(counts: Int[Tensor, "batch"], mask: Bool[Tensor, "batch tokens"], seed: int = 0) -> Int[Tensor, "batch most"]:
    """Vectors drawn at random as first centres; a set's draw depends on its length and the seed alone."""
    most = int(counts.max()) if counts.numel() else 0
    first = torch.zeros(len(mask), most, dtype=torch.long)
    for item, (real, k) in enumerate(zip(mask.cpu(), counts.tolist(), strict=True)):
        own = real.nonzero().squeeze(1)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
        first[item, :k] = own[order[:k]]
    return first.to(mask.device)


def heaviest(
    weights: Float[Tensor, "batch tokens"], counts: Int[Tensor, "batch"], mask: Bool[Tensor, "batch tokens"]
) -> Int[Tensor, "batch most"]:
    """The vectors of largest weight as first centres, in their order."""
    most = int(counts.max()) if counts.numel() else 0
    order = weights.detach().masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return _ascending(order[:, :most], counts, mask.shape[1])


def farthest(
    distances: Float[Tensor, "batch tokens tokens"], counts: Int[Tensor, "batch"], mask: Bool[Tensor, "batch tokens"]
) -> Int[Tensor, "batch most"]:
    """Vectors far from each other as first centres: the one nearest to all, then each time the one farthest from those that
    are taken."""
    most = int(counts.max()) if counts.numel() else 0
    item = torch.arange(len(mask), device=mask.device)
    near = (distances * mask[:, None]).sum(-1).neg().masked_fill(~mask, -torch.inf)
    found = torch.zeros(len(mask), most, dtype=torch.long, device=mask.device)
    free, reach = mask.clone(), torch.full_like(near, torch.inf)
    for k in range(most):
        at = near.argmax(1)
        found[:, k] = at
        free[item, at] = False
        reach = reach.minimum(distances[item, at])
        near = reach.masked_fill(~free, -torch.inf)
    return _ascending(found, counts, mask.shape[1])


def kmeans(
    x: Float[Tensor, "batch tokens dim"],
    first: Int[Tensor, "batch most"],
    counts: Int[Tensor, "batch"],
    mask: Bool[Tensor, "batch tokens"],
    weights: Float[Tensor, "batch tokens"] | None = None,
    *,
    iterations: int = 5,
) -> Int[Tensor, "batch tokens"]:
    """Lloyd's algorithm for `sum_i w_i min_k ||x_i - c_k||^2`.

    A centre that nobody is nearest to stays where it was; one that nobody is nearest to in the end is given the vector that is
    farthest from its own centre. A cluster whose weights sum to zero has the plain mean.

    Args:
        x: the vectors.
        first: numbers of those that are the first centres.
        counts: of clusters.
        mask: True = a real vector.
        weights: `w`, at least zero; None for all alike.
        iterations: how often centres are moved.

    Returns:
        The cluster of each vector, -1 for padding.
    """
    most = first.shape[1]
    if not most:
        return torch.full(mask.shape, -1, dtype=torch.long, device=mask.device)
    points, none = _centred(x.detach(), mask), _beyond(counts, most)
    weights = None if weights is None else weights.detach()
    centres = points[torch.arange(len(x), device=x.device)[:, None], first]
    before: Tensor | None = None
    for _ in range(iterations):
        assignment = _nearest(points, centres, none, mask)[1]
        if before is not None and torch.equal(assignment, before):
            break
        before = assignment
        means = merged(points, assignment, most, weights=weights)
        centres = torch.where(means.real.unsqueeze(-1), means.tokens, centres)
    near, assignment = _nearest(points, centres, none, mask)
    return _filled(assignment, near, none, mask)


def kmedoids(
    distances: Float[Tensor, "batch tokens tokens"],
    first: Int[Tensor, "batch most"],
    counts: Int[Tensor, "batch"],
    mask: Bool[Tensor, "batch tokens"],
    weights: Float[Tensor, "batch tokens"] | None = None,
    *,
    iterations: int = 5,
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch most"]]:
    """Medoids for `sum_i w_i min_k d(i, c_k)`: each vector goes to the nearest medoid, then the medoid of a cluster is that
    member to which the members are nearest.

    A medoid always belongs to its own cluster. A cluster whose weights sum to zero counts its members alike.

    Args:
        distances: `d`, from each vector (rows) to each medoid (columns).
        first: numbers of the vectors that are the first medoids.
        counts: of clusters.
        mask: True = a real vector.
        weights: `w`, at least zero; None for all alike.
        iterations: how often medoids are chosen.

    Returns:
        The cluster of each vector, -1 for padding; and the medoid of each cluster, of those beyond the count any number.
    """
    most = first.shape[1]
    none, medoids = _beyond(counts, most), first
    assignment = to_medoids(distances, medoids, none, mask)
    for _ in range(iterations if most else 0):
        found = medoids_of(distances, assignment, medoids, mask, weights)
        if torch.equal(found, medoids):
            break
        medoids = found
        assignment = to_medoids(distances, medoids, none, mask)
    return assignment, medoids


def medoids_of(
    distances: Float[Tensor, "batch tokens tokens"],
    assignment: Int[Tensor, "batch tokens"],
    before: Int[Tensor, "batch most"],
    mask: Bool[Tensor, "batch tokens"],
    weights: Float[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch most"]:
    """Of each cluster the member to which the members are nearest, `argmin_m sum_i w_i d(i, m)`.

    Args:
        distances: `d`, from each vector (rows) to each medoid (columns).
        assignment: the cluster of each vector, -1 for padding.
        before: what stays where a cluster is empty.
        mask: True = a real vector.
        weights: `w`, at least zero; None for all alike, as in a cluster whose weights sum to zero.
    """
    tokens, most = mask.shape[1], before.shape[1]
    weights = torch.where(mask, torch.ones_like(distances[:, 0]) if weights is None else weights.detach(), 0.0)
    slot = assignment.remainder(most + 1)
    total = weights.new_zeros(len(mask), most + 1).scatter_add(1, slot, weights).gather(1, slot)
    fair = torch.where((total <= 0) & mask, torch.ones_like(weights), weights).to(distances.dtype)
    same = (assignment[:, :, None] == assignment[:, None]) & mask[:, :, None] & mask[:, None]
    # the cost of candidate m, that of its members i
    cost = torch.einsum("bi,bim->bm", fair, torch.where(same, distances, 0.0))
    least = cost.new_full((len(mask), most + 1), torch.inf).scatter_reduce(1, slot, cost, "amin")
    at = torch.arange(tokens, device=mask.device).expand_as(mask)
    cheapest = at.masked_fill(cost > least.gather(1, slot), tokens)
    found = torch.full_like(least, tokens, dtype=torch.long).scatter_reduce(1, slot, cheapest, "amin")[:, :most]
    return torch.where(found == tokens, before, found)


def density_peaks(
    distances: Float[Tensor, "batch tokens tokens"],
    counts: Int[Tensor, "batch"],
    mask: Bool[Tensor, "batch tokens"],
    *,
    neighbours: int = 5,
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch most"]]:
    """Clusters around vectors that are dense and far from denser ones.

    `rho_i = exp(-mean_{j in kNN(i)} d_ij)`, `delta_i = min_{j: rho_j > rho_i} sqrt(d_ij)`, for the densest the largest distance
    of all; those of largest `rho delta` are centres, and each vector goes to the nearest. Of two that are equally dense the
    first is denser.

    Args:
        distances: `d`, squared.
        counts: of clusters.
        mask: True = a real vector.
        neighbours: `k`, fewer where a set has fewer others.

    Returns:
        The cluster of each vector, -1 for padding; and the centre of each cluster, of those beyond the count any number.
    """
    tokens, most = mask.shape[1], int(counts.max()) if counts.numel() else 0
    pairs = mask[:, :, None] & mask[:, None]
    itself = torch.eye(tokens, dtype=torch.bool, device=mask.device)
    others = distances.masked_fill(~pairs | itself, torch.inf)
    nearest = others.sort(dim=-1).values[..., :neighbours]
    there = nearest.isfinite()
    # rho may be too small for a float, its logarithm is not
    rho = -torch.where(there, nearest, 0.0).sum(-1) / there.sum(-1).clamp(min=1)
    at = torch.arange(tokens, device=mask.device)
    denser = (rho[:, None] > rho[:, :, None]) | ((rho[:, None] == rho[:, :, None]) & (at < at[:, None]))
    above = others.masked_fill(~denser, torch.inf).amin(-1) if tokens else rho
    largest = torch.where(pairs, distances, 0.0).flatten(1).amax(1) if tokens else rho.sum(1)
    delta = torch.where(above.isfinite(), above, largest[:, None])
    peak = rho + 0.5 * delta.clamp(min=torch.finfo(delta.dtype).tiny).log()
    centres = heaviest(peak, counts, mask)
    return to_medoids(distances, centres, _beyond(counts, most), mask), centres


def bipartite_matching(
    metric: Float[Tensor, "batch tokens dim"],
    left: Bool[Tensor, "batch tokens"],
    right: Bool[Tensor, "batch tokens"],
    merges: Int[Tensor, "batch"],
) -> Int[Tensor, "batch tokens"]:
    """The vector that each is merged into, its own number where it stays: each on the left has its most similar one on the
    right, and the `merges` most similar of these edges count.

    Args:
        metric: by whose cosine vectors are alike; one of length zero is like nobody.
        left: those that may be merged away.
        right: those that they are merged into, any number into the same.
        merges: how many, at most those on the left.
    """
    onto = torch.arange(left.shape[1], device=left.device).expand(left.shape)
    at_left, is_left = _numbers(left)
    at_right, is_right = _numbers(right)
    if not at_left.shape[1] or not at_right.shape[1]:
        return onto
    item = torch.arange(len(left), device=left.device)[:, None]
    unit = torch.nn.functional.normalize(metric.detach().to(accumulation_dtype(metric.dtype)), dim=-1)
    similarity = unit[item, at_left] @ unit[item, at_right].transpose(1, 2)
    best, partner = similarity.masked_fill(~is_right[:, None], -torch.inf).max(-1)
    order = best.masked_fill(~is_left, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    goes = torch.arange(order.shape[1], device=order.device) < merges[:, None]
    goes = torch.zeros_like(is_left).scatter(1, order, goes) & is_left & is_right.any(1, keepdim=True)
    # what only fills the table would overwrite others: it is written where nobody looks
    to = torch.where(goes, at_right.gather(1, partner), at_left)
    wider = torch.nn.functional.pad(onto, (0, 1))
    return wider.scatter(1, at_left.masked_fill(~is_left, left.shape[1]), to)[:, :-1]


def greedy_pairs(
    similarity: Float[Tensor, "batch tokens tokens"],
    pairs: Int[Tensor, "batch"],
    mask: Bool[Tensor, "batch tokens"],
) -> Int[Tensor, "batch tokens"]:
    """The vector that each is merged into, its own number where it stays: the most similar pairs one after the other, each
    vector in one at most; the later of a pair goes to the earlier."""
    tokens = mask.shape[1]
    onto = torch.arange(tokens, device=mask.device).repeat(len(mask), 1)
    item = torch.arange(len(mask), device=mask.device)
    above = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).triu(1)
    free = mask.clone()
    for step in range(int(pairs.max()) if pairs.numel() and tokens else 0):
        possible = above & free[:, :, None] & free[:, None]
        at = similarity.masked_fill(~possible, -torch.inf).flatten(1).argmax(1)
        first, second = at.div(tokens, rounding_mode="floor"), at.remainder(tokens)
        counts = (step < pairs) & possible.flatten(1).any(1)
        onto[item[counts], second[counts]] = first[counts]
        free[item[counts], first[counts]] = False
        free[item[counts], second[counts]] = False
    return onto


def numbered(onto: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """Of the vector that each is merged into, the assignment: those that stay are counted in their order."""
    stays = mask & (onto == torch.arange(mask.shape[1], device=mask.device))
    return (stays.cumsum(1) - 1).gather(1, onto).masked_fill(~mask, -1)


def bipartite_clusters(
    metric: Float[Tensor, "batch tokens dim"],
    counts: Int[Tensor, "batch"],
    mask: Bool[Tensor, "batch tokens"],
    sizes: Float[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Clusters by bipartite matching of every second vector with the others, the first among these.

    One matching takes away half of the vectors at most; where fewer are to be left, the means of those are matched again.

    Args:
        metric: by whose cosine vectors are alike.
        counts: of clusters.
        mask: True = a real vector.
        sizes: weights of the means, None for all alike.

    Returns:
        The cluster of each vector, -1 for padding.
    """
    found = selected(metric.detach().to(accumulation_dtype(metric.dtype)), mask, sizes)
    while bool((over := (found.counts - counts).clamp(min=0)).any()):
        left = found.real & ((found.real.cumsum(1) - 1).remainder(2) == 1)
        onto = bipartite_matching(found.tokens, left, found.real & ~left, over)
        assignment = numbered(onto, found.real)
        found = found.then(_merged(found, assignment))
    return found.assignment


def to_medoids(
    distances: Float[Tensor, "batch tokens tokens"],
    medoids: Int[Tensor, "batch most"],
    none: Bool[Tensor, "batch most"],
    mask: Bool[Tensor, "batch tokens"],
) -> Int[Tensor, "batch tokens"]:
    """The nearest medoid of each vector, a medoid's own for itself; -1 for padding.

    Args:
        distances: to medoids in columns.
        medoids: their numbers.
        none: True where there is no medoid.
        mask: True = a real vector.
    """
    tokens, most = mask.shape[1], medoids.shape[1]
    if not most:
        return torch.full(mask.shape, -1, dtype=torch.long, device=mask.device)
    near = distances.gather(2, medoids[:, None].expand(-1, tokens, -1)).masked_fill(none[:, None], torch.inf)
    found = torch.nn.functional.pad(near.argmin(-1), (0, 1))
    own = torch.arange(most, device=mask.device).expand_as(medoids)
    return found.scatter(1, medoids.masked_fill(none, tokens), own)[:, :-1].masked_fill(~mask, -1)


def _merged(found: Reduced, assignment: Tensor) -> Reduced:
    return merged(found.tokens, assignment, int(assignment.max()) + 1, found.sizes)


def _beyond(counts: Int[Tensor, "batch"], most: int) -> Bool[Tensor, "batch most"]:
    """True for clusters that a set has not."""
    return torch.arange(most, device=counts.device) >= counts[:, None]


def _ascending(numbers: Int[Tensor, "batch most"], counts: Tensor, tokens: int) -> Int[Tensor, "batch most"]:
    """The first `counts` of each row in ascending order, then numbers that mean nothing."""
    none = _beyond(counts, numbers.shape[1])
    return numbers.masked_fill(none, tokens).sort(dim=1).values.clamp(max=max(tokens - 1, 0))


def _numbers(chosen: Bool[Tensor, "batch tokens"]) -> tuple[Int[Tensor, "batch some"], Bool[Tensor, "batch some"]]:
    """Numbers of the chosen of each set in their order, and which of these are of use."""
    counts = chosen.sum(1, keepdim=True)
    some = int(counts.max()) if counts.numel() else 0
    order = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :some]
    return order, torch.arange(some, device=chosen.device) < counts


def _centred(x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
    """The vectors around their mean, since products of what is far from zero cancel; zeros in padding."""
    real = mask.unsqueeze(-1)
    wide = torch.where(real, x.detach().to(accumulation_dtype(x.dtype)), 0.0)
    return torch.where(real, wide - wide.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1), 0.0)


def _between(a: Float[Tensor, "batch n dim"], b: Float[Tensor, "batch m dim"]) -> Float[Tensor, "batch n m"]:
    """Squared distances; zero where they are below rounding."""
    scale = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None]
    found = scale - 2 * a @ b.transpose(1, 2)
    return torch.where(found <= 8 * torch.finfo(scale.dtype).eps * scale, 0.0, found)


def _nearest(
    x: Float[Tensor, "batch tokens dim"],
    centres: Float[Tensor, "batch most dim"],
    none: Bool[Tensor, "batch most"],
    mask: Bool[Tensor, "batch tokens"],
) -> tuple[Float[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """The squared distance to the nearest centre, and which it is."""
    near, found = _between(x, centres).masked_fill(none[:, None], torch.inf).min(-1)
    return near, found.masked_fill(~mask, -1)


def _filled(
    assignment: Int[Tensor, "batch tokens"],
    near: Float[Tensor, "batch tokens"],
    none: Bool[Tensor, "batch most"],
    mask: Bool[Tensor, "batch tokens"],
) -> Int[Tensor, "batch tokens"]:
    """The same without empty clusters: each takes what is farthest from its centre and not alone there."""
    most, at = none.shape[1], torch.arange(mask.shape[1], device=mask.device)
    while True:
        slot = assignment.remainder(most + 1)
        members = torch.zeros(len(mask), most + 1, dtype=torch.long, device=mask.device)
        members = members.scatter_add(1, slot, torch.ones_like(slot))
        empty = (members[:, :most] == 0) & ~none
        if not bool(empty.any()):
            return assignment
        spare = mask & (members.gather(1, slot) > 1)
        moved = (at == near.masked_fill(~spare, -torch.inf).argmax(1)[:, None]) & empty.any(1, keepdim=True)
        assignment = torch.where(moved, empty.to(torch.uint8).argmax(1, keepdim=True), assignment)
        near = near.masked_fill(moved, 0.0)
