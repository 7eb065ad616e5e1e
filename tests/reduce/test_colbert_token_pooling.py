import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from torch.nn.functional import normalize

import cenote
from cenote.core import Bags
from cenote.core.clusters import cosine_kmeans
from cenote.reduce import (
    HierarchicalPooling,
    KMeansPooling,
    SequentialPooling,
    pool_document,
    pool_documents,
    real_documents,
)
from cenote.reduce.colbert_token_pooling.documents import METHODS, VARIANTS


def unit(*shape: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


DOCUMENTS = [unit(n, 8, seed=n) for n in (23, 9, 2, 1)]


def test_the_default_is_wards_linkage_on_cosine_distances() -> None:
    x = DOCUMENTS[0]
    found = pool_document(x, 3)
    distances = (1 - x[1:] @ x[1:].T).numpy()
    labels = fcluster(linkage(distances[np.triu_indices(22, 1)], "ward"), 7, "maxclust")
    expected = torch.stack([x[1:][torch.from_numpy(labels == label)].mean(0) for label in range(1, labels.max() + 1)])
    assert torch.equal(found.vectors[0], x[0])
    assert torch.allclose(found.vectors[1:], expected, atol=1e-6)
    assert found.assignment.tolist() == [0, *labels.tolist()]


def test_sequential_groups_by_hand() -> None:
    x = DOCUMENTS[1]
    found = pool_document(x, 3, 1, method="sequential")
    by_hand = torch.stack([x[0], x[1:4].mean(0), x[4:7].mean(0), x[7:9].mean(0)])
    assert torch.allclose(found.vectors, by_hand, atol=1e-7)


def test_k_means_recovers_separated_groups() -> None:
    groups = torch.arange(4).repeat_interleave(6)
    x = normalize(
        torch.eye(4, 8)[groups] + 0.05 * torch.randn(24, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    mask = torch.ones(1, 24, dtype=torch.bool)
    # Lloyd's algorithm ends where it began if two first centres are of one group
    seeds = [
        s
        for s in range(200)
        if len(groups[torch.randperm(24, generator=torch.Generator().manual_seed(s))[:4]].unique()) == 4
    ]
    for seed in seeds[:5]:
        found = cosine_kmeans(x[None], torch.tensor([4]), mask, seed=seed)[0]
        assert torch.equal(found[:, None] == found, groups[:, None] == groups)


@pytest.mark.parametrize("method", METHODS)
def test_list_ragged_and_single_documents_agree(method: str) -> None:
    one = [pool_document(d, 2, method=method) for d in DOCUMENTS]
    for given in (DOCUMENTS, Bags.from_list(DOCUMENTS)):
        bags, assignments = pool_documents(given, 2, method=method)
        assert torch.equal(bags.values, torch.cat([o.vectors for o in one]))
        assert all(torch.equal(a, o.assignment) for a, o in zip(assignments, one, strict=True))


def test_workers_give_the_same() -> None:
    alone, _ = pool_documents(DOCUMENTS, 2)
    shared, _ = pool_documents(DOCUMENTS, 2, workers=2)
    assert torch.equal(alone.values, shared.values)


def test_padding_and_punctuation_are_left_out_first() -> None:
    x, ids = unit(1, 4, 8), torch.tensor([[7, 1, 9, 0]])
    found = real_documents(x, torch.tensor([[True, True, True, False]]), ids, skipped={1})
    assert torch.equal(found.values, x[0, [0, 2]])
    with pytest.raises(cenote.InputError, match="ids: expected the vocabulary numbers"):
        real_documents(x, skipped={1})


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_shrink_comes_back_unchanged(method: str) -> None:
    for n, protected in ((1, 0), (1, 1), (2, 1), (3, 3)):
        x = unit(n, 8)
        found = pool_document(x, 4, protected, method=method)
        assert torch.equal(found.vectors, x)
        assert found.assignment.tolist() == list(range(n))
    assert torch.equal(pool_document(DOCUMENTS[0], 1, method=method).vectors, DOCUMENTS[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_crashes_on_one_vector(variant: str) -> None:
    assert torch.equal(pool_document(unit(1, 8), 2, variant=variant).vectors, unit(1, 8))


def test_fewer_tokens_than_the_factor_are_one_vector() -> None:
    x = unit(5, 8)
    assert torch.allclose(pool_document(x, 9, 0).vectors, x.mean(0, keepdim=True))
    assert len(pool_document(x, 9, 1).vectors) == 2


def test_merging_duplicates_changes_no_score() -> None:
    x = unit(3, 8).repeat(4, 1)
    found = pool_document(x, 4, 0)
    queries = unit(5, 8, seed=1)
    assert len(found.vectors) == 3
    assert torch.allclose((queries @ x.T).amax(1), (queries @ found.vectors.T).amax(1), atol=1e-6)


def test_equal_heights_leave_fewer_clusters_than_asked() -> None:
    assert len(pool_document(unit(1, 8).expand(9, -1), 3, 0).vectors) == 1


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_vectors_without_direction_are_reported(value: float) -> None:
    x = unit(6, 8).clone()
    x[[2, 4]] = value
    with pytest.raises(
        cenote.InputError, match=r"document: 2 of 6 vectors are zero, NaN or infinite \(the first is number 2\)"
    ):
        pool_document(x, 2)


def test_protected_vectors_keep_their_bits() -> None:
    x = DOCUMENTS[0]
    assert torch.equal(pool_document(x, 3, 2).vectors[:2], x[:2])
    assert torch.equal(pool_document(x, 3, 2, variant="colbert").vectors[-2:], x[:2])


def test_a_pooled_vector_scores_no_more_than_its_best_member() -> None:
    queries = unit(20, 8, seed=3)
    before = (queries @ DOCUMENTS[0].T).amax(1)
    for variant in ("pylate", "colbert"):
        after = (queries @ pool_document(DOCUMENTS[0], 3, variant=variant).vectors.T).amax(1)
        assert bool((after <= before + 1e-6).all())
    lifted = (queries @ pool_document(DOCUMENTS[0], 3, unit_norm=True).vectors.T).amax(1)
    assert bool((lifted > before + 1e-3).any())


def test_the_order_of_tokens_only_permutes_clusters() -> None:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    before = pool_document(DOCUMENTS[0], 3, 0).assignment[order]
    after = pool_document(DOCUMENTS[0][order], 3, 0).assignment
    assert torch.equal(before[:, None] == before, after[:, None] == after)


def test_variants_differ_among_each_other() -> None:
    found = {name: pool_document(DOCUMENTS[0], 4, variant=name).vectors for name in VARIANTS}
    names = list(found)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert found[a].shape != found[b].shape or not torch.allclose(found[a], found[b]), (a, b)


def test_counts_of_the_variants() -> None:
    counts = {name: len(pool_document(DOCUMENTS[0], 4, variant=name).vectors) for name in VARIANTS}
    assert counts == {
        "pylate": 6,
        "colbert": 5,
        "pylate-1.3.4": 6,
        "sentence-transformers": 6,
        "colpali": 5,
        "vespa": 7,
    }


def test_unit_norm_means() -> None:
    found = pool_document(DOCUMENTS[0], 3, variant="sentence-transformers").vectors
    assert torch.allclose(found.norm(dim=1), torch.ones(len(found)))


def test_one_tree_serves_every_factor() -> None:
    bags = Bags.from_list(DOCUMENTS)
    reducer = HierarchicalPooling(factor=2, unit_norm=False)
    swept = reducer.documents(bags, factors=(2, 3, 6), protect=1)
    for factor, (pooled, assignments) in swept.items():
        one = HierarchicalPooling(factor=factor, unit_norm=False)
        for document, vectors, assignment in zip(bags, pooled, assignments, strict=True):
            alone = one(document[None], protect=1)
            assert torch.allclose(vectors, alone.tokens[0], atol=1e-6)
            assert torch.equal(assignment, alone.assignment[0])
    # cuts of one tree are nested
    fine, coarse = swept[2][1][0], swept[6][1][0]
    assert all(len(coarse[fine == k].unique()) == 1 for k in fine.unique())


def test_sizes_weigh_the_means() -> None:
    x = unit(1, 2, 8)
    found = HierarchicalPooling(factor=2, unit_norm=False)(x, torch.tensor([[3.0, 1.0]]))
    assert torch.allclose(found.tokens[0, 0], (3 * x[0, 0] + x[0, 1]) / 4, atol=1e-6)
    assert found.sizes.tolist() == [[4.0]]


def test_impossible_settings_are_told() -> None:
    with pytest.raises(cenote.InputError, match="variant: expected 'pylate', 'colbert'"):
        pool_document(unit(4, 8), 2, variant="ragatouille")
    with pytest.raises(cenote.InputError, match="method: expected 'hierarchical', 'kmeans' or 'sequential'"):
        pool_document(unit(4, 8), 2, method="ward")
    with pytest.raises(cenote.InputError, match="factor: expected a number from 1, got 0"):
        HierarchicalPooling(factor=0)
    with pytest.raises(cenote.InputError, match="iterations: expected at least 1"):
        KMeansPooling(factor=2, iterations=0)


def test_groups_of_a_fixed_number_are_even() -> None:
    found = SequentialPooling(tokens=3, unit_norm=False)(torch.arange(7.0).view(1, 7, 1))
    assert found.sizes.tolist() == [[3.0, 2.0, 2.0]]


def test_vectors_of_another_length_than_one_are_told() -> None:
    with pytest.raises(
        cenote.InputError, match="document: expected vectors of unit length, one is off by 4; scale them"
    ):
        pool_document(5 * DOCUMENTS[0], 3)
    assert len(pool_document(DOCUMENTS[0].half(), 3).vectors) == 8
