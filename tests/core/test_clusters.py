"""Clusters of many sets at once: exact numbers, none empty, and the optima of small sets by trying all."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from cenote.core.clusters import (
    bipartite_clusters,
    bipartite_matching,
    density_peaks,
    drawn,
    farthest,
    greedy_pairs,
    heaviest,
    kmeans,
    kmedoids,
    numbered,
    squared_distances,
)
from cenote.core.reduced import merged

X = torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(12) < torch.tensor([12, 7, 3])[:, None]
COUNTS = torch.tensor([4, 3, 3])
WEIGHTS = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) + 0.05


def loss(x: Tensor, centres: Tensor, weights: Tensor) -> float:
    return float((weights * torch.cdist(x, centres).square().amin(1)).sum())


def test_distances_of_equal_vectors_are_zero_wherever_they_are() -> None:
    x = torch.cat([X[:1, :3], X[:1, :3]], 1) + 1000
    found = squared_distances(x, torch.ones(1, 6, dtype=torch.bool))
    assert bool((found[0].diagonal() == 0).all())
    assert bool((found[0, :3, 3:].diagonal() == 0).all())
    half = squared_distances(X.half(), MASK)
    assert half.dtype == torch.float32
    assert bool((half >= 0).all())


@pytest.mark.parametrize("start", ["drawn", "heaviest", "farthest"])
def test_every_set_has_exactly_its_clusters(start: str) -> None:
    distances = squared_distances(X, MASK)
    first = {
        "drawn": lambda: drawn(COUNTS, MASK),
        "heaviest": lambda: heaviest(WEIGHTS, COUNTS, MASK),
        "farthest": lambda: farthest(distances, COUNTS, MASK),
    }[start]()
    found = {
        "means": kmeans(X, first, COUNTS, MASK, WEIGHTS),
        "medoids": kmedoids(distances, first, COUNTS, MASK, WEIGHTS)[0],
        "peaks": density_peaks(distances, COUNTS, MASK)[0],
        "bipartite": bipartite_clusters(X, COUNTS, MASK),
    }
    for name, assignment in found.items():
        for item in range(3):
            assert assignment[item][MASK[item]].unique().tolist() == list(range(int(COUNTS[item]))), name
        assert bool((assignment[~MASK] == -1).all())


def test_lloyd_is_that_of_scikit_learn() -> None:
    x, w = X[:1], WEIGHTS[:1]
    mask, counts = MASK[:1], COUNTS[:1]
    first = heaviest(w, counts, mask)
    found = kmeans(x, first, counts, mask, w, iterations=50)
    peer = KMeans(4, init=x[0, first[0]].numpy(), n_init=1, max_iter=300, tol=0, algorithm="lloyd")
    assert found[0].tolist() == peer.fit(x[0].numpy(), sample_weight=w[0].numpy()).labels_.tolist()


def test_losses_never_rise() -> None:
    x, w = torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 1, 40)[None]
    mask, counts = torch.ones(1, 40, dtype=torch.bool), torch.tensor([5])
    distances, first = squared_distances(x, mask), heaviest(w, counts, mask)
    means, medoids = [], []
    for iterations in range(6):
        a = kmeans(x, first, counts, mask, w, iterations=iterations)
        means.append(loss(x[0], merged(x, a, 5, weights=w).tokens[0], w[0]))
        m = kmedoids(distances, first, counts, mask, w, iterations=iterations)[1]
        medoids.append(loss(x[0], x[0, m[0]], w[0]))
    for losses in (means, medoids):
        assert all(b <= a + 1e-5 for a, b in pairwise(losses))
        assert losses[-1] < losses[0]


def test_medoids_are_no_better_than_the_best_and_no_member_is_a_better_one() -> None:
    for seed in range(5):
        x = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(seed))
        mask, counts, w = torch.ones(1, 8, dtype=torch.bool), torch.tensor([2]), WEIGHTS[:1, :8]
        distances = squared_distances(x, mask)
        assignment, medoids = kmedoids(distances, heaviest(w, counts, mask), counts, mask, w, iterations=20)
        best = min(loss(x[0], x[0, list(pair)], w[0]) for pair in combinations(range(8), 2))
        assert loss(x[0], x[0, medoids[0]], w[0]) >= best - 1e-5
        for k in range(2):
            own = (assignment[0] == k).nonzero().squeeze(1)
            costs = [float((w[0, own] * distances[0, own, m]).sum()) for m in own]
            assert int(medoids[0, k]) == int(own[int(np.argmin(costs))])


def test_a_centre_that_nobody_is_nearest_to_stays_and_gets_what_is_farthest_in_the_end() -> None:
    x = torch.tensor([[[0.0], [0.0], [0.0], [5.0]]])
    mask, counts = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])
    # the first has all four and moves away; the second, at zero still, is nearest to the zeros then
    assert kmeans(x, torch.tensor([[0, 1]]), counts, mask).tolist() == [[1, 1, 1, 0]]
    assert kmeans(x, torch.tensor([[0, 1]]), counts, mask, iterations=0).tolist() == [[0, 0, 0, 1]]


def test_weights_that_sum_to_zero_count_alike() -> None:
    x = torch.tensor([[[0.0], [1.0], [2.0], [10.0]]])
    mask, counts = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])
    weights = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    _, medoids = kmedoids(squared_distances(x, mask), torch.tensor([[0, 3]]), counts, mask, weights)
    assert medoids.tolist() == [[1, 3]]


def test_among_equals_the_first_is_taken() -> None:
    x = torch.zeros(1, 4, 2)
    mask, counts = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])
    distances = squared_distances(x, mask)
    assert heaviest(torch.ones(1, 4), counts, mask).tolist() == [[0, 1]]
    assert farthest(distances, counts, mask).tolist() == [[0, 1]]
    assert kmedoids(distances, torch.tensor([[0, 1]]), counts, mask)[0].tolist() == [[0, 1, 0, 0]]
    assert density_peaks(distances, counts, mask)[0].tolist() == [[0, 1, 0, 0]]
    assert greedy_pairs(torch.zeros(1, 4, 4), torch.tensor([1]), mask).tolist() == [[0, 0, 2, 3]]


def test_peaks_are_those_of_separated_groups() -> None:
    groups = torch.arange(3).repeat_interleave(5)
    x = 10 * torch.eye(3)[groups] + 0.1 * torch.randn(15, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 15, dtype=torch.bool)
    found, centres = density_peaks(squared_distances(x[None], mask) / 3, torch.tensor([3]), mask)
    assert found[0].tolist() == groups.tolist()
    assert groups[centres[0]].tolist() == [0, 1, 2]


def test_peaks_by_hand() -> None:
    # 0, 1, 3 on a line with two neighbours: mean squares 5, 2.5, 6.5; the densest is the middle one
    x = torch.tensor([[[0.0], [1.0], [3.0]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    distances = squared_distances(x, mask)
    rho = torch.exp(-torch.tensor([5.0, 2.5, 6.5]))
    expected = (rho * torch.tensor([1.0, 3.0, 2.0])).topk(2).indices.sort().values
    assert density_peaks(distances, torch.tensor([2]), mask, neighbours=2)[1][0].tolist() == expected.tolist()


def test_the_most_similar_edges_of_a_matching_count() -> None:
    metric = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 2.0], [0.0, 0.0]]])
    left = torch.tensor([[False, True, False, True, False]])
    right = torch.tensor([[True, False, True, False, True]])
    assert bipartite_matching(metric, left, right, torch.tensor([1])).tolist() == [[0, 1, 2, 2, 4]]
    onto = bipartite_matching(metric, left, right, torch.tensor([2]))
    assert onto.tolist() == [[0, 0, 2, 2, 4]]
    assert numbered(onto, left | right).tolist() == [[0, 0, 1, 1, 2]]
    nobody = torch.zeros_like(left)
    assert bipartite_matching(metric, left, nobody, torch.tensor([2])).tolist() == [[0, 1, 2, 3, 4]]


def test_greedy_pairs_against_all_pairs() -> None:
    x = torch.nn.functional.normalize(X[:1, :6], dim=-1)
    similarity = x @ x.transpose(1, 2)
    onto = greedy_pairs(similarity, torch.tensor([2]), torch.ones(1, 6, dtype=torch.bool))[0]
    taken: set[int] = set()
    for i, j in sorted(combinations(range(6), 2), key=lambda p: -float(similarity[0, p[0], p[1]])):
        if len(taken) < 4 and not taken & {i, j}:
            taken |= {i, j}
            assert int(onto[j]) == i
    assert int((onto != torch.arange(6)).sum()) == 2
