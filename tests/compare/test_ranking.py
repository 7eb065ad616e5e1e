import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from cenote.compare.ranking import (
    first_found,
    found_share,
    gained,
    ndcg,
    over_tasks,
    recall,
    reciprocal_ranks,
    spearman,
)
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


def test_graded_gains_by_hand() -> None:
    # found: not judged, 2, judged as wrong, 1, 3; a 1 was not found
    gains, relevant = np.array([[0, 2, -1, 1, 3]], dtype=float), np.array([[3, 2, 1, 1, -1]], dtype=float)
    found = 2 / np.log2(3) + 1 / np.log2(5) + 3 / np.log2(6)
    best = 3 + 2 / np.log2(3) + 1 / np.log2(4) + 1 / np.log2(5)
    assert gained(gains, relevant).tolist() == pytest.approx([found / best])
    assert gained(gains, relevant, k=2).tolist() == pytest.approx([2 / np.log2(3) / (3 + 2 / np.log2(3))])
    assert found_share(gains, relevant, k=10).tolist() == [3 / 4]
    assert found_share(gains, relevant, k=3).tolist() == [1 / 4]
    assert (first_found(gains, 10).tolist(), first_found(gains, 1).tolist()) == ([1 / 2], [0.0])


def test_depths_beyond_what_was_found() -> None:
    nothing, relevant = np.zeros((2, 0)), np.array([[1.0], [0.0]])
    assert [f(nothing, relevant).tolist() for f in (gained, found_share)] == [[0.0, 0.0]] * 2
    assert first_found(nothing, 10).tolist() == [0.0, 0.0]
    similarity, relevance = np.array([[0.9, 0.5, 0.1]]), np.array([[0.0, 0.0, 1.0]])
    assert reciprocal_ranks(similarity, relevance, k=2).tolist() == [0.0]
    assert recall(similarity, relevance, k=9).tolist() == [1.0]


def test_measures_are_those_of_trec_eval() -> None:
    library = pytest.importorskip(
        "pytrec_eval", reason="pytrec-eval-terrier is not installed; the values by hand stand"
    )
    rng = np.random.default_rng(0)
    similarity, relevance = rng.random((8, 40)), rng.integers(-1, 4, (8, 40)).astype(float)
    judged = {str(q): {str(d): int(g) for d, g in enumerate(row)} for q, row in enumerate(relevance)}
    run = {str(q): {str(d): float(s) for d, s in enumerate(row)} for q, row in enumerate(similarity)}
    measures = {"ndcg_cut.10", "recall.5,20", "recip_rank"}
    expected = library.RelevanceEvaluator(judged, measures).evaluate(run)
    ours = {
        "ndcg_cut_10": ndcg(similarity, relevance),
        "recall_5": recall(similarity, relevance, 5),
        "recall_20": recall(similarity, relevance, 20),
        "recip_rank": reciprocal_ranks(similarity, relevance),
    }
    for name, values in ours.items():
        assert values.tolist() == pytest.approx([expected[str(q)][name] for q in range(8)])


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
