import numpy as np
import pytest
import sklearn.metrics as reference

from cenote.compare import metrics
from cenote.core import InputError

RNG = np.random.default_rng(0)
WEIGHTS = RNG.multinomial(60, np.full(60, 1 / 60), size=5).astype(float)


def test_accuracy_agrees_with_scikit_learn() -> None:
    scores, y = RNG.normal(size=(60, 4)), RNG.integers(0, 4, 60)
    for w, got in zip(WEIGHTS, metrics.accuracy(scores, y, WEIGHTS), strict=True):
        assert got == pytest.approx(reference.accuracy_score(y, scores.argmax(1), sample_weight=w))


def test_binary_accuracy_reads_the_sign_of_the_logit() -> None:
    assert metrics.accuracy(np.array([[2.0], [-1.0], [3.0]]), np.array([1, 0, 0]), np.ones((1, 3)))[0] == pytest.approx(
        2 / 3
    )


def test_balanced_accuracy_agrees_with_scikit_learn() -> None:
    scores, y = RNG.normal(size=(60, 3)), RNG.choice(3, 60, p=[0.7, 0.2, 0.1])
    for w, got in zip(WEIGHTS, metrics.balanced_accuracy(scores, y, WEIGHTS), strict=True):
        assert got == pytest.approx(reference.balanced_accuracy_score(y, scores.argmax(1), sample_weight=w))


@pytest.mark.parametrize("classes", [None, (1, 2), (3,)])
@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_agrees_with_scikit_learn(average: str, classes: tuple[int, ...] | None) -> None:
    scores, y = RNG.normal(size=(60, 4)), RNG.choice(4, 60, p=[0.6, 0.2, 0.15, 0.05])
    labels = list(range(4) if classes is None else classes)
    by_class = metrics.precision_recall_f1(scores, y, WEIGHTS)
    for i, (w, got) in enumerate(zip(WEIGHTS, metrics.f1(average, classes)(scores, y, WEIGHTS), strict=True)):
        told = {"labels": labels, "sample_weight": w, "zero_division": 0}
        assert got == pytest.approx(reference.f1_score(y, scores.argmax(1), average=average, **told))
        expected = reference.precision_recall_fscore_support(y, scores.argmax(1), **told)[:3]
        np.testing.assert_allclose(by_class[:, i][:, labels], np.stack(expected))


def test_f1_of_a_class_that_is_nowhere_is_zero() -> None:
    scores = np.eye(3)[[0, 1]]
    assert metrics.f1(classes=(2,))(scores, np.array([0, 1]), np.ones((1, 2)))[0] == 0
    with pytest.raises(InputError, match="average"):
        metrics.f1("mean")


@pytest.mark.parametrize("decimals", [9, 0])
def test_auroc_agrees_with_scikit_learn_with_and_without_ties(decimals: int) -> None:
    scores, y = RNG.normal(size=(60, 1)).round(decimals), RNG.integers(0, 2, 60)
    for w, got in zip(WEIGHTS, metrics.auroc(scores, y, WEIGHTS), strict=True):
        assert got == pytest.approx(reference.roc_auc_score(y, scores[:, 0], sample_weight=w))


def test_auroc_of_one_class_is_not_a_number() -> None:
    assert np.isnan(metrics.auroc(np.zeros((3, 1)), np.ones(3), np.ones((1, 3)))[0])


@pytest.mark.parametrize("decimals", [9, 0])
def test_mean_average_precision_agrees_with_scikit_learn(decimals: int) -> None:
    scores, y = RNG.normal(size=(60, 3)).round(decimals), (RNG.random((60, 3)) < 0.3).astype(float)
    for w, got in zip(WEIGHTS, metrics.mean_average_precision(scores, y, WEIGHTS), strict=True):
        expected = np.mean(
            [reference.average_precision_score(y[:, k], scores[:, k], sample_weight=w) for k in range(3)]
        )
        assert got == pytest.approx(expected)


def test_r2_agrees_with_scikit_learn() -> None:
    y = RNG.normal(size=(60, 2))
    scores = y + RNG.normal(size=(60, 2))
    for w, got in zip(WEIGHTS, metrics.r2(scores, y, WEIGHTS), strict=True):
        assert got == pytest.approx(reference.r2_score(y, scores, sample_weight=w))


@pytest.mark.parametrize("name", list(metrics.SHARES))
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_shares_of_all_items_sum_to_the_metric(name: str, outputs: int) -> None:
    y = (
        RNG.normal(size=(60, outputs))
        if name == "R2"
        else RNG.choice(max(2, outputs), 60, p=[[0.8, 0.2], [0.7, 0.2, 0.1]][outputs > 1])
    )
    scores = RNG.normal(size=(60, outputs))
    shares = metrics.SHARES[name](scores, y)
    assert shares.sum() == pytest.approx(metrics.METRICS[name](scores, y, np.ones((1, 60)))[0])
    alone = scores.copy()
    alone[1:] = RNG.normal(size=(59, outputs))
    assert metrics.SHARES[name](alone, y)[0] == shares[0], "what an item adds hangs on no other item's scores"
