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
        if name in ("R2", "negative MAE")
        else RNG.choice(max(2, outputs), 60, p=[[0.8, 0.2], [0.7, 0.2, 0.1]][outputs > 1])
    )
    scores = RNG.normal(size=(60, outputs))
    shares = metrics.SHARES[name](scores, y)
    assert shares.sum() == pytest.approx(metrics.METRICS[name](scores, y, np.ones((1, 60)))[0])
    alone = scores.copy()
    alone[1:] = RNG.normal(size=(59, outputs))
    assert metrics.SHARES[name](alone, y)[0] == shares[0], "what an item adds hangs on no other item's scores"


def _softmax(scores: np.ndarray) -> np.ndarray:
    e = np.exp(scores)
    return e / e.sum(1, keepdims=True)


OF_CLASSES = {
    "Matthews": lambda y, s, w: reference.matthews_corrcoef(y, s.argmax(1), sample_weight=w),
    "quadratic kappa": lambda y, s, w: reference.cohen_kappa_score(
        y, s.argmax(1), weights="quadratic", sample_weight=w, labels=[0, 1, 2, 3]
    ),
    "negative log loss": lambda y, s, w: -reference.log_loss(y, _softmax(s), sample_weight=w, labels=[0, 1, 2, 3]),
    "macro F1": lambda y, s, w: reference.f1_score(y, s.argmax(1), average="macro", sample_weight=w, zero_division=0),
}
OF_TWO = {
    "F1": lambda y, s, w: reference.f1_score(y, s[:, 0] > 0, sample_weight=w),
    "Matthews": lambda y, s, w: reference.matthews_corrcoef(y, s[:, 0] > 0, sample_weight=w),
    "average precision": lambda y, s, w: reference.average_precision_score(y, s[:, 0], sample_weight=w),
    "negative log loss": lambda y, s, w: -reference.log_loss(y, 1 / (1 + np.exp(-s[:, 0])), sample_weight=w),
}
OF_LABELS = {
    "macro F1": lambda y, s, w: reference.f1_score(y, s > 0, average="macro", sample_weight=w),
    "micro F1": lambda y, s, w: reference.f1_score(y, s > 0, average="micro", sample_weight=w),
}
OF_TARGETS = {
    "negative MAE": lambda y, s, w: -reference.mean_absolute_error(y, s, sample_weight=w),
    "negative RMSE": lambda y, s, w: -reference.root_mean_squared_error(y, s, sample_weight=w),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind, known in (("classes", OF_CLASSES), ("two", OF_TWO), ("labels", OF_LABELS), ("targets", OF_TARGETS))
        for name in known
    ],
)
def test_it_agrees_with_scikit_learn(kind: str, name: str) -> None:
    rng = np.random.default_rng(4)
    known, outputs, y = {
        "classes": (OF_CLASSES, 4, rng.integers(0, 4, 60)),
        "two": (OF_TWO, 1, rng.integers(0, 2, 60)),
        "labels": (OF_LABELS, 3, rng.integers(0, 2, (60, 3)).astype("float32")),
        "targets": (OF_TARGETS, 2, rng.normal(size=(60, 2)) + 50),
    }[kind]
    scores = rng.normal(size=(60, outputs)) + (50 if kind == "targets" else 0)
    for w, got in zip(WEIGHTS, metrics.METRICS[name](scores, y, WEIGHTS), strict=True):
        assert got == pytest.approx(known[name](y, scores, w), abs=1e-10)  # type: ignore[no-untyped-call]


def test_spearman_is_scipys_on_repeated_items() -> None:
    from scipy.stats import spearmanr

    scores, y = RNG.normal(size=(60, 2)).round(1), RNG.normal(size=(60, 2)).round(1)
    for w, got in zip(WEIGHTS, metrics.spearman(scores, y, WEIGHTS), strict=True):
        times = np.repeat(np.arange(60), w.astype(int))
        expected = np.mean([spearmanr(scores[times, k], y[times, k]).statistic for k in range(2)])
        assert got == pytest.approx(expected, abs=1e-10)
    assert np.isnan(metrics.spearman(np.zeros((60, 2)), y, WEIGHTS)).all()


def test_calibration_error_by_hand() -> None:
    # two items of confidence 0.9, one right; two of 0.6, both right
    p = np.array([0.9, 0.9, 0.6, 0.6])
    scores, y = np.log(p / (1 - p))[:, None], np.array([1, 0, 1, 1])
    assert metrics.negative_calibration_error(scores, y, np.ones((1, 4)))[0] == pytest.approx(-(0.4 + 0.4) / 2)


def test_extremes_of_what_is_judged() -> None:
    sure, y = np.array([[-9.0], [9.0], [9.0]]), np.array([0, 1, 1])
    ones = np.ones((1, 3))
    assert metrics.matthews(sure, y, ones)[0] == pytest.approx(1.0)
    assert metrics.matthews(np.full((3, 1), 2.0), y, ones)[0] == 0.0
    assert metrics.quadratic_kappa(sure, y, ones)[0] == pytest.approx(1.0)
    assert metrics.binary_f1(np.full((3, 1), -2.0), y, ones)[0] == 0.0
    # a class that is given no chance at all costs as much as scikit-learn lets it
    assert metrics.negative_log_loss(np.array([[-np.inf, 0.0]]), np.array([0]), np.ones((1, 1)))[0] == metrics.LEAST_LOG


def test_the_rarest_of_several_labels() -> None:
    y = np.array([[1, 0], [1, 0], [1, 1]], dtype="float32")
    assert metrics.rarest_class(y, np.array([0, 1, 2])) == 1
