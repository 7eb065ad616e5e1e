"""Metrics under item weights, many weightings at once: the jackknife leaves out each group once.

Every metric takes `scores [items, outputs]`, `y` and `weights [resamples, items]` and gives `[resamples]`; weights of one
give the plain metric. Items are the units of a comparison; where each has a score of its own, `mean` is the metric.
scikit-learn's functions are the reference in the tests; called once per resample, method and seed they would take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray

from cenote.core.requirements import require_one_of

Metric = Callable[[Any, Any, Float[ndarray, "resamples items"]], Float[ndarray, "resamples"]]
"""`(scores [items, *outputs], y [items, *targets], weights) -> [resamples]`; higher is better."""

Shares = Callable[[Any, Any], Float[ndarray, "items"]]
"""`(scores, y) -> [items]`: what each item adds to a metric by itself; the shares of all items sum to it."""

PairShares = Callable[[Any, Any, Any], Float[ndarray, "items"]]
"""`(scores, scores of another arm, y) -> [items]`: what each item adds to the difference of a metric, averaged over all
exchanges of the two arms in the other items. The shares sum to the difference; the arms exchanged in an item, its share
changes sign."""

Carriers = Callable[[Any, Any], int]
"""`(y, group of each item) -> int`: how many groups a metric stands on."""

WEIGHTS_AT_ONCE = 4_000_000
"""Of all units under several weightings, so that memory does not grow with their product."""

RESAMPLES_AT_ONCE = 128
"""Whose weights of a thousand items stay in the cache."""

BINS = 15
"""Of confidence."""

LEAST_LOG = float(np.log(np.finfo(np.float64).eps))
"""Of a probability, as scikit-learn clips it."""


def mean(scores: Float[ndarray, "items"], _y: object, weights: ndarray) -> ndarray:
    """Mean of the items' own scores; there is nothing to compare them with."""
    return weights @ scores / weights.sum(1)


def accuracy(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Share of items whose highest score is their class."""
    return weights @ _right(scores, y) / weights.sum(1)


def balanced_accuracy(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Mean over the classes of the share of their items that are right."""
    right = _right(scores, y)
    of_class = (y[:, None] == np.unique(y)).astype(weights.dtype)
    with np.errstate(invalid="ignore"):
        recall = weights @ (of_class * right[:, None]) / (weights @ of_class)
    return np.nanmean(recall, 1)


def precision_recall_f1(scores: ndarray, y: ndarray, weights: ndarray) -> Float[ndarray, "three resamples classes"]:
    """Precision, recall and F1 of each class; 0 where none is guessed, or none is there."""
    numbers = np.arange(scores.shape[1])
    guessed, true = scores.argmax(1)[:, None] == numbers, y[:, None] == numbers
    both, of_guesses, of_truth = (weights @ m.astype(weights.dtype) for m in (guessed & true, guessed, true))
    return np.stack([_share(both, of_guesses), _share(both, of_truth), _share(2 * both, of_guesses + of_truth)])


def f1(average: Literal["macro", "micro"] = "macro", classes: Sequence[int] | None = None) -> Metric:
    """The metric F1 of some classes: the mean of theirs, or that of all their decisions together.

    Args:
        average: `"macro"` or `"micro"`.
        classes: numbers of those that count, such as all relations without the negative class; `None`: all.

    >>> scores, y = np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 1])
    >>> f1("micro", classes=(1, 2))(scores, y, np.ones((1, 4))).round(3).tolist()
    [0.667]
    """
    require_one_of(("macro", "micro"), average=average)

    def metric(scores: Any, y: Any, weights: ndarray) -> ndarray:
        chosen = np.arange(scores.shape[1]) if classes is None else np.asarray(classes)
        if average == "macro":
            return precision_recall_f1(scores, y, weights)[2][:, chosen].mean(1)
        guess = scores.argmax(1)
        counted = (np.isin(guess, chosen).astype(float) + np.isin(y, chosen)) / 2
        return _share(weights @ ((guess == y) & np.isin(y, chosen)).astype(float), weights @ counted)

    return metric


def auroc(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Probability that a positive item scores above a negative one; NaN where a resample has only one class."""
    positive = y == 1
    s_pos, s_neg = scores[positive, 0], scores[~positive, 0]
    order = np.argsort(s_neg, kind="stable")
    negatives, positives = np.flatnonzero(~positive)[order], np.flatnonzero(positive)
    # of each positive item the number of negative ones below it, and of those not above it
    below = np.searchsorted(s_neg[order], s_pos, "left")
    not_above = np.searchsorted(s_neg[order], s_pos, "right")
    tied = bool((below != not_above).any())
    found = np.empty(len(weights))
    for start in range(0, len(weights), RESAMPLES_AT_ONCE):
        # items first: a resample's weights then lie side by side in every step
        w = weights[start : start + RESAMPLES_AT_ONCE].T
        w_pos, w_neg = w[positives], np.zeros((len(negatives) + 1, w.shape[1]))
        np.cumsum(w[negatives], 0, out=w_neg[1:])
        beaten = w_neg[below]
        if tied:
            beaten = (beaten + w_neg[not_above]) / 2
        with np.errstate(invalid="ignore"):
            pairs = w_pos.sum(0) * w_neg[-1]
            found[start : start + RESAMPLES_AT_ONCE] = np.einsum("ir,ir->r", w_pos, beaten) / pairs
    return found


def mean_average_precision(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Mean over the labels of average precision; labels without a positive item in a resample are left out of its mean."""
    with np.errstate(invalid="ignore"):
        per_label = [_average_precision(scores[:, k], y[:, k] > 0.5, weights) for k in range(scores.shape[1])]
        return np.nanmean(np.stack(per_label), 0)


def r2(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Explained share of the variance, averaged over the targets."""
    # squares of targets far from zero would cancel
    middle = np.asarray(y, dtype=np.float64).mean(0)
    scores, y = np.asarray(scores, dtype=np.float64) - middle, np.asarray(y, dtype=np.float64) - middle
    total = weights.sum(1, keepdims=True)
    mean = weights @ y / total
    with np.errstate(invalid="ignore", divide="ignore"):
        unexplained = weights @ (scores - y) ** 2 / (weights @ y**2 - total * mean**2)
    return (1 - unexplained).mean(1)


def binary_f1(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """F1 of the positive class, of logits `[items, 1]`; 0 where none is guessed and none is there."""
    guessed, true = scores[:, 0] > 0, y == 1
    both, of_guesses, of_truth = (weights @ m.astype(weights.dtype) for m in (guessed & true, guessed, true))
    return _share(2 * both, of_guesses + of_truth)


def macro_f1(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Mean of the F1 of the classes; of several labels at once, each guessed where its logit is above zero, of the labels'."""
    if y.ndim == 1:
        return f1("macro")(scores, y, weights)
    both, of_guesses, of_truth = _decisions(scores, y, weights)
    return _share(2 * both, of_guesses + of_truth).mean(1)


def micro_f1(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """F1 of all decisions about several labels together."""
    both, of_guesses, of_truth = _decisions(scores, y, weights)
    return _share(2 * both.sum(1), of_guesses.sum(1) + of_truth.sum(1))


def average_precision(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Area under precision and recall of the positive class; NaN where a resample has no positive item."""
    with np.errstate(invalid="ignore"):
        return _average_precision(scores[:, 0], y == 1, weights)


def matthews(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Matthews' correlation of guess and class, of two classes or more; 0 where either is the same for all."""
    confusion = _confusion(scores, y, weights)
    total = confusion.sum((1, 2))
    guessed, true = confusion.sum(1), confusion.sum(2)
    covariance = np.trace(confusion, axis1=1, axis2=2) * total - (guessed * true).sum(1)
    spread = (total**2 - (guessed**2).sum(1)) * (total**2 - (true**2).sum(1))
    return _share(covariance, np.sqrt(np.maximum(spread, 0.0)))


def quadratic_kappa(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Cohen's kappa with quadratic weights, of classes in their order; 1 where nothing is off and nothing could be."""
    confusion = _confusion(scores, y, weights)
    numbers = np.arange(confusion.shape[1])
    off = (numbers[:, None] - numbers) ** 2.0
    by_chance = confusion.sum(2)[:, :, None] * confusion.sum(1)[:, None, :] / confusion.sum((1, 2))[:, None, None]
    return 1 - _share((confusion * off).sum((1, 2)), (by_chance * off).sum((1, 2)))


def negative_log_loss(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Mean logarithm of the probability that an item's class is given, of logits; 0 at best."""
    return weights @ _log_likelihood(scores, y) / weights.sum(1)


def negative_calibration_error(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Less the expected calibration error of the guess: confidence less accuracy, absolute, mean over 15 bins of confidence
    by their items."""
    p = np.exp(_log_probabilities(scores))
    confidence, right = p.max(1), (p.argmax(1) == y).astype(np.float64)
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    within = (bins[:, None] == np.arange(BINS)) * (confidence - right)[:, None]
    return -np.abs(weights @ within).sum(1) / weights.sum(1)


def negative_mean_absolute_error(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Less the mean distance between prediction and target, averaged over the targets."""
    return weights @ mean_absolute_error_shares(scores, y) * len(y) / weights.sum(1)


def negative_root_mean_squared_error(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Less the root of the mean squared distance, of each target, averaged over the targets."""
    scores, y = np.asarray(scores, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return -np.sqrt(weights @ (scores - y) ** 2 / weights.sum(1, keepdims=True)).mean(1)


def spearman(scores: ndarray, y: ndarray, weights: ndarray) -> ndarray:
    """Correlation of the ranks of prediction and target, averaged over the targets; NaN where one is constant."""
    scores, y = np.asarray(scores, dtype=np.float64), np.asarray(y, dtype=np.float64)
    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for k in range(y.shape[1]):
            a, b = (_weighted_ranks(v[:, k], weights) for v in (scores, y))
            total = weights.sum(1, keepdims=True)
            a, b = (v - (weights * v).sum(1, keepdims=True) / total for v in (a, b))
            spread = np.sqrt((weights * a**2).sum(1) * (weights * b**2).sum(1))
            found.append((weights * a * b).sum(1) / np.where(spread > 0, spread, np.nan))
    return np.mean(found, 0)


def log_loss_shares(scores: ndarray, y: ndarray) -> ndarray:
    """What each item adds to the negative log loss."""
    return _log_likelihood(scores, y) / len(y)


def mean_absolute_error_shares(scores: ndarray, y: ndarray) -> ndarray:
    """What each item adds to the negative mean absolute error."""
    scores, y = np.asarray(scores, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return -np.abs(scores - y).mean(1) / len(y)


def mean_shares(scores: Float[ndarray, "items"], _y: object) -> ndarray:
    """What each item adds to the mean."""
    return scores / len(scores)


def accuracy_shares(scores: ndarray, y: ndarray) -> ndarray:
    """What each item adds to the accuracy."""
    return _right(scores, y) / len(y)


def balanced_accuracy_shares(scores: ndarray, y: ndarray) -> ndarray:
    """What each item adds to the balanced accuracy: more where its class is rare."""
    classes, of_item, count = np.unique(y, return_inverse=True, return_counts=True)
    return _right(scores, y) / (count[of_item] * len(classes))


def r2_shares(scores: ndarray, y: ndarray) -> ndarray:
    """What each item adds to R2: an even share less what it leaves unexplained."""
    scores, y = np.asarray(scores, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return (1 / len(y) - (scores - y) ** 2 / ((y - y.mean(0)) ** 2).sum(0)).mean(1)


def auroc_pair_shares(first: ndarray, second: ndarray, y: ndarray) -> ndarray:
    """What each item adds to the difference of two AUROCs.

    AUROC is a mean over pairs of a positive and a negative item. Exchange two arms in some items and in the rest: in the
    difference of the two AUROCs all terms cancel but those that are linear in the signs of the exchanges. So the exchange is
    one of signs, of each item's place in the first arm less its place in the second, both among the items of the other
    class in both arms together.

    Args:
        first, second: of one scale, such as ranks.
        y: 1 of positive items.
    """
    positive = y == 1
    first, second = first[:, 0], second[:, 0]
    shares = np.empty(len(y))
    for own, sign in ((positive, 0.5), (~positive, -0.5)):
        others = np.sort(np.concatenate([first[~own], second[~own]]))
        with np.errstate(invalid="ignore", divide="ignore"):
            shares[own] = (
                sign * (_below(first[own], others) - _below(second[own], others)) / np.float64(own.sum() * (~own).sum())
            )
    return shares


SHARES: dict[str, Shares] = {
    "accuracy": accuracy_shares,
    "balanced accuracy": balanced_accuracy_shares,
    "R2": r2_shares,
    "negative log loss": log_loss_shares,
    "negative MAE": mean_absolute_error_shares,
}
"""What each item adds to a metric, by itself: the shares of all items sum to it.

F1, correlations and roots have none. AUROC and average precision neither: they rank the items against each other, so that what
one of them adds hangs on the others; a test that took such shares as independent would raise a false alarm of AUROC in a third
of all cases.
"""

PAIR_SHARES: dict[str, PairShares] = {"AUROC": auroc_pair_shares}

RANKING = ("AUROC", "average precision", "mean average precision", "Spearman")
"""Metrics that see the order of the scores, and not their scale."""

LIMITS: dict[str, tuple[float | None, float | None]] = {
    "accuracy": (0.0, 1.0),
    "balanced accuracy": (0.0, 1.0),
    "AUROC": (0.0, 1.0),
    "mean average precision": (0.0, 1.0),
    "R2": (None, 1.0),
    "F1": (0.0, 1.0),
    "macro F1": (0.0, 1.0),
    "micro F1": (0.0, 1.0),
    "average precision": (0.0, 1.0),
    "Matthews": (-1.0, 1.0),
    "quadratic kappa": (None, 1.0),
    "negative log loss": (None, 0.0),
    "negative calibration error": (-1.0, 0.0),
    "negative MAE": (None, 0.0),
    "negative RMSE": (None, 0.0),
    "Spearman": (-1.0, 1.0),
}

OF_SHARES = (
    "accuracy",
    "balanced accuracy",
    "AUROC",
    "mean average precision",
    "average precision",
    "F1",
    "macro F1",
    "micro F1",
)
"""Metrics that people read in per cent."""


def rarest_class(y: ndarray, groups: ndarray) -> int:
    """Groups with an item of the class that is in the fewest of them; of several labels at once, with a positive item.

    >>> rarest_class(np.array([0, 0, 1, 1, 1]), np.array([0, 1, 2, 2, 0]))
    2
    """
    held = [y == c for c in np.unique(y)] if y.ndim == 1 else list(y.T > 0.5)
    return min(len(np.unique(groups[of])) for of in held)


CARRIERS: dict[str, Carriers] = dict.fromkeys(
    ("AUROC", "balanced accuracy", "F1", "macro F1", "average precision", "Matthews", "quadratic kappa"), rarest_class
)
"""Of metrics that stand on fewer groups than there are."""

METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "balanced accuracy": balanced_accuracy,
    "AUROC": auroc,
    "mean average precision": mean_average_precision,
    "R2": r2,
    "F1": binary_f1,
    "macro F1": macro_f1,
    "micro F1": micro_f1,
    "average precision": average_precision,
    "Matthews": matthews,
    "quadratic kappa": quadratic_kappa,
    "negative log loss": negative_log_loss,
    "negative calibration error": negative_calibration_error,
    "negative MAE": negative_mean_absolute_error,
    "negative RMSE": negative_root_mean_squared_error,
    "Spearman": spearman,
}


def pieces(rows: Shaped[ndarray, "rows *rest"], units: int) -> list[Shaped[ndarray, "_rows *rest"]]:
    """Rows in parts that so many weights each do not make too large.

    >>> [len(part) for part in pieces(np.arange(9), 1_000_000)]
    [4, 4, 1]
    """
    step = max(1, WEIGHTS_AT_ONCE // units)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def ranked(scores: Float[ndarray, "items outputs"]) -> Float[ndarray, "items outputs"]:
    """The rank of each item in each output, as a share of the items; ties share theirs."""
    import scipy.stats

    return scipy.stats.rankdata(scores, axis=0) / len(scores)


def _below(values: ndarray, others: ndarray) -> ndarray:
    """Of how many others, in order, each value is above; of equal ones half."""
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / 2


def _share(part: ndarray, whole: ndarray) -> ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _decisions(scores: ndarray, y: ndarray, weights: ndarray) -> list[Float[ndarray, "resamples labels"]]:
    """Weights of right yeses, of yeses, and of what is."""
    guessed, true = scores > 0, y > 0.5
    return [weights @ m.astype(weights.dtype) for m in (guessed & true, guessed, true)]


def _guess(scores: ndarray) -> ndarray:
    return (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(1)


def _confusion(scores: ndarray, y: ndarray, weights: ndarray) -> Float[ndarray, "resamples classes classes"]:
    """Weights of the items by class and guess."""
    classes = max(2, scores.shape[1])
    pair = y.astype(np.int64) * classes + _guess(scores)
    held, of_item = np.unique(pair, return_inverse=True)
    found = np.zeros((len(weights), classes * classes))
    found[:, held] = weights @ (of_item[:, None] == np.arange(len(held))).astype(np.float64)
    return found.reshape(-1, classes, classes)


def _log_probabilities(scores: ndarray) -> Float[ndarray, "items classes"]:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], 1)
    scores = scores - scores.max(1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(1, keepdims=True))


def _log_likelihood(scores: ndarray, y: ndarray) -> Float[ndarray, "items"]:
    # votes of neighbours may give a class no chance at all
    found = _log_probabilities(scores)[np.arange(len(y)), y.astype(np.int64)]
    return np.maximum(found, LEAST_LOG)


def _weighted_ranks(values: Float[ndarray, "items"], weights: ndarray) -> Float[ndarray, "resamples items"]:
    """Weight below each value, and half of that of its equals."""
    distinct, of_item = np.unique(values, return_inverse=True)
    held = weights @ (of_item[:, None] == np.arange(len(distinct))).astype(np.float64)
    return (np.cumsum(held, 1) - held / 2)[:, of_item]


def _right(scores: ndarray, y: ndarray) -> ndarray:
    return (_guess(scores) == y).astype(np.float64)


def _average_precision(s: ndarray, positive: ndarray, weights: ndarray) -> ndarray:
    order = np.argsort(-s, kind="stable")
    s, positive, w = s[order], positive[order], weights[:, order]
    last_of_tie = np.flatnonzero(np.r_[s[1:] != s[:-1], True])
    found = np.cumsum(w * positive, 1)[:, last_of_tie]
    read = np.cumsum(w, 1)[:, last_of_tie]
    precision = np.divide(found, read, out=np.zeros_like(found), where=read > 0)
    gained = np.diff(found, axis=1, prepend=0.0)
    return (precision * gained).sum(1) / found[:, -1]
