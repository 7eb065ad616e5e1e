import math

import pytest
import torch
from torch.nn.functional import normalize

from cenote.core import Bags, InputError, maxsim
from cenote.core.maxsim import maxsim as scores_of
from cenote.core.maxsim import search


def drawn(lengths: list[int], dim: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Bags:
    generator = torch.Generator().manual_seed(seed)
    return Bags.from_list([normalize(torch.randn(n, dim, generator=generator), dim=1).to(dtype) for n in lengths])


def by_loops(queries: Bags, documents: Bags) -> list[list[float]]:
    return [
        [sum(max((float(a.double() @ b.double()) for b in d), default=-math.inf) for a in q) for d in documents]
        for q in queries
    ]


def padded(queries: Bags, documents: Bags) -> torch.Tensor:
    (q, real), (d, there) = queries.to_padded(), documents.to_padded()
    products = torch.einsum("qid,njd->qnij", q, d.to(q.dtype)).masked_fill(~there[None, :, None], -math.inf)
    return (products.amax(3) * real[:, None]).sum(2)


@pytest.mark.parametrize("at_once", [(64, 5 * 2**20), (3, 5 * 2**20), (64, 40), (1, 8), (2, 30)])
def test_scores_are_those_of_a_double_loop(at_once: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxsim, "DOCUMENTS_AT_ONCE", at_once[0])
    monkeypatch.setattr(maxsim, "VALUES_AT_ONCE", at_once[1])
    queries, documents = drawn([3, 1, 5], seed=1), drawn([4, 9, 1, 2, 12, 7])
    found = scores_of(queries, documents)
    torch.testing.assert_close(found, torch.tensor(by_loops(queries, documents)))
    torch.testing.assert_close(found, padded(queries, documents))


def test_half_precision_is_summed_in_float32() -> None:
    queries, documents = drawn([4, 6], 32, seed=1), drawn([20, 30, 10], 32, dtype=torch.float16)
    found = scores_of(queries, documents)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, padded(queries, documents.to(torch.float32)))
    torch.testing.assert_close(found, scores_of(queries, drawn([20, 30, 10], 32)), atol=4e-3, rtol=0)
    assert scores_of(drawn([2], dtype=torch.float64), drawn([3], dtype=torch.float64)).dtype == torch.float64


def test_means_of_vectors_never_score_above_them() -> None:
    queries, documents = drawn([3, 5], seed=2), drawn([8, 6, 12])
    means = Bags.from_list([torch.stack([pair.mean(0) for pair in d.split(2)]) for d in documents])
    assert bool((scores_of(queries, means) <= scores_of(queries, documents) + 1e-6).all())


def test_an_empty_document_is_found_last_and_an_empty_query_finds_nothing_better() -> None:
    queries, documents = drawn([2, 0], seed=1), drawn([3, 0, 2])
    found = scores_of(queries, documents)
    assert found[:, 1].tolist() == [-math.inf, -math.inf]
    assert found[1, [0, 2]].tolist() == [0.0, 0.0]
    assert search(queries, documents, 3).numbers[0, 2] == 1
    assert scores_of(queries, documents.select(torch.tensor([], dtype=torch.long))).shape == (2, 0)


@pytest.mark.parametrize("merged_at_once", [1, 7, 4096])
def test_search_is_a_sort_of_all_scores(merged_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxsim, "MERGED_AT_ONCE", merged_at_once)
    monkeypatch.setattr(maxsim, "DOCUMENTS_AT_ONCE", 4)
    queries, documents = drawn([3, 4], seed=1), drawn([1 + n % 5 for n in range(30)])
    # three copies tie, and the lower number comes first
    documents = Bags.from_list([*documents, documents[0], documents[0]])
    all_scores = scores_of(queries, documents)
    for k in (1, 5, 40):
        found = search(queries, documents, k)
        expected = all_scores.sort(dim=1, descending=True, stable=True)
        assert torch.equal(found.numbers, expected.indices[:, :k])
        assert torch.equal(found.scores, expected.values[:, :k])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="queries: are 8 wide and documents 4"):
        scores_of(drawn([1]), drawn([1], dim=4))
    with pytest.raises(InputError, match="k: expected at least 1"):
        search(drawn([1]), drawn([1]), 0)
