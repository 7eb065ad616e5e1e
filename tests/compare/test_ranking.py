import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from cenote.compare.ranking import ndcg, over_tasks, reciprocal_ranks, spearman
from cenote.core import InputError


def test_ranks_and_gains_by_hand() -> None:
    similarity = np.array([[0.9, 0.5, 0.1], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5], [1.0, 0.5, 0.0]])
    relevance = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]], dtype=float)
    assert reciprocal_ranks(similarity, relevance).tolist() == [0.5, 1.0, 1 / 3, 0.0]
    np.testing.assert_allclose(ndcg(similarity, relevance), [1 / np.log2(3), 1.0, 0.5, 0.0])
    assert ndcg(similarity, relevance, k=1).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_ndcg_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    similarity, relevance = rng.random((5, 30)), rng.integers(0, 4, (5, 30)).astype(float)
    for k in (3, 10, 30):
        assert ndcg(similarity, relevance, k).mean() == pytest.approx(ndcg_score(relevance, similarity, k=k))


def test_rank_correlation() -> None:
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 400.0])) == pytest.approx(1)
    assert spearman(np.ones(3), np.array([1.0, 2.0, 3.0])) == 0.0


def test_models_are_compared_over_tasks() -> None:
    first = {f"task {i}": 0.5 + 0.01 * (i + 1) for i in range(6)}
    second = dict.fromkeys(first, 0.5)
    better = over_tasks(first, second)
    assert (better.p, better.effect, better.tasks) == (pytest.approx(2 / 2**6), 1.0, 6)
    assert better.difference == pytest.approx(0.035)
    worse = over_tasks(second, first)
    assert (worse.p, worse.effect) == (better.p, -1.0)
    # ranks 1 and 3 for the first, 2 for the second
    assert over_tasks({"a": 0.1, "b": 0.0, "c": 0.3}, {"a": 0.0, "b": 0.2, "c": 0.0}).effect == pytest.approx(2 / 6)
    assert over_tasks(second, second)[:2] == (1.0, 0.0)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InputError, match="relevance: expected shape"):
        ndcg(np.ones((1, 2)), np.ones((1, 3)))
    with pytest.raises(InputError, match="second: expected the tasks a, got b"):
        over_tasks({"a": 1.0}, {"b": 1.0})
