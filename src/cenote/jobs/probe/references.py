"""What a colleague would try first: k nearest neighbours and scikit-learn's linear models on what the baseline pools.

They stand in the table to show whether the recipe did its work: a probe on the mean that stays below a logistic regression
on the same vectors was trained badly, whatever it is compared with. They are fitted on train alone, and validation chooses
`k`, `C` or `alpha` by the metric that judges.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from cenote.compare.arms import Arm, OnShare, unheard
from cenote.compare.cells import Cell
from cenote.compare.metrics import METRICS
from cenote.features.dataset import Task
from cenote.jobs.probe import training
from cenote.jobs.probe.arms import Trial

NEIGHBOURS = (50, 20, 10, 5, 3, 1)
INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
RIDGE_PENALTIES = (1e5, 1e4, 1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3)
"""Grids begin with the smoothest model: of equally good ones it is kept."""

LOGISTIC_STEPS = 300
"""Of L-BFGS at each `C`, from where the one before ended."""

MOST_PRODUCTS = 2**43
"""Multiply-adds for distances between items that are worth a row: minutes on a few cores."""

Fit = Callable[[ndarray, ndarray, ndarray, Task, int], Iterator[tuple[float, Float[ndarray, "asked outputs"]]]]
"""`(features of train, its targets, features asked for, task, outputs) -> (setting, scores of what was asked)`, one by one."""


@dataclass(frozen=True)
class Reference(Arm):
    """One of `references_of`, measured on the view of the data that the baseline has.

    Attributes:
        name: see `references_of`.
        beside: the baseline.
    """

    name: str
    beside: Trial
    reference: bool = True

    @property
    def summary(self) -> str:  # type: ignore[override]
        """That of the model."""
        return TOLD[self.name][0]

    def key(self) -> Mapping[str, Any]:
        """Data, number of seeds, metric; not the recipe, which it does without."""
        of = self.beside
        return {"data": of.fingerprint(of.column.data), "seeds": len(of.seeds), "metric": of.metric}

    def sources(self) -> tuple[type | ModuleType, ...]:
        """This file, and the pool."""
        return (type(self), self.beside.column.method.load())

    def unfit(self) -> str | None:
        """Why it would take too long."""
        data = self.beside.column.data
        train = len(data.indices("train"))
        products = train * (len(data) - train) * data.dim
        if self.name == "knn" and products > MOST_PRODUCTS:
            return f"the distances between {train:,} and {len(data) - train:,} items would take too long"
        return None

    def run(self, on_share: OnShare = unheard) -> Cell:
        """The same scores for every seed: nothing in it is drawn."""
        from threadpoolctl import threadpool_limits

        start = time.perf_counter()
        of = self.beside
        data = of.column.data
        train, val, test = (data.indices(split) for split in ("train", "val", "test"))
        with threadpool_limits(1 if training.steps_are_small(data, of.recipe) else None):
            items = torch.arange(len(data))
            x = training.vectors(of.build(), data, items, of.recipe.tokens_at_once).double().numpy()
            mean, deviation = x[train].mean(0), x[train].std(0)
            x = (x - mean) / np.where(deviation > 0, deviation, 1.0)
            asked, y_val = x[torch.cat([val, test])], data.y[val].numpy()
            grid, fit = FITS[self.name]
            best, chosen, scores = -np.inf, grid[0], None
            # what does not converge, or hardly has an inverse, validation will not choose
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for tried, (value, found) in enumerate(
                    fit(x[train], data.y[train].numpy(), asked, data.task, data.outputs)
                ):
                    with np.errstate(invalid="ignore", divide="ignore"):
                        now = float(METRICS[of.metric](found[: len(val)], y_val, np.ones((1, len(val))))[0])
                    if scores is None or now > best:
                        best, chosen, scores = now, value, found
                    on_share(self.name, 0.99 * (tried + 1) / len(grid))
        assert scores is not None
        record = {
            "settings": {TOLD[self.name][1]: chosen},
            "layers": of.column.layers,
            "validation_per_seed": [best] * len(of.seeds),
            "seconds": time.perf_counter() - start,
        }
        told = torch.from_numpy(scores[len(val) :]).float()
        return Cell(self.name, record, {"scores": told.expand(len(of.seeds), -1, -1)})

    def gains_by_processes(self) -> bool:
        """As the baseline's."""
        return self.beside.gains_by_processes()

    def travelling(self) -> Self:
        """The same, without what only reports and keys need."""
        return dataclasses.replace(self, beside=self.beside.travelling())


def references_of(baseline: Trial) -> tuple[Reference, ...]:
    """`knn`, and `ridge` for regression, else `logistic-regression`."""
    return tuple(Reference(name, baseline) for name in reference_names(baseline.column.data.task))


def reference_names(task: Task) -> tuple[str, ...]:
    """Of a task.

    >>> reference_names("binary")
    ('knn', 'logistic-regression')
    """
    return ("knn", "ridge" if task == "regression" else "logistic-regression")


def _nearest(
    x: ndarray, y: ndarray, asked: ndarray, task: Task, outputs: int
) -> Iterator[tuple[float, Float[ndarray, "asked outputs"]]]:
    """Mean over the `k` nearest of train: of targets, or of labels; above 0 where most say yes."""
    from sklearn.neighbors import NearestNeighbors

    grid = [k for k in NEIGHBOURS if k <= len(x)]
    nearest = NearestNeighbors(n_neighbors=grid[0]).fit(x).kneighbors(asked, return_distance=False)
    targets = np.eye(outputs)[y] if task == "multiclass" else y.reshape(len(y), -1).astype(np.float64)
    total = np.zeros((len(asked), targets.shape[1]))
    for rank in range(grid[0]):
        total += targets[nearest[:, rank]]
    left = grid[0]
    for k in grid:
        while left > k:
            left -= 1
            total = total - targets[nearest[:, left]]
        yield k, total / k - (0.5 if task in ("binary", "multilabel") else 0.0)


def _logistic(
    x: ndarray, y: ndarray, asked: ndarray, task: Task, outputs: int
) -> Iterator[tuple[float, Float[ndarray, "asked outputs"]]]:
    """One model for all classes; of labels, one for each."""
    if task == "multiclass":
        classifiers = [_Classifier(x, y, outputs)]
    else:
        classifiers = [_Classifier(x, labels > 0.5, 2) for labels in y.reshape(len(y), -1).T]
    for c in INVERSE_PENALTIES:
        found = [classifier.logits(c, asked) for classifier in classifiers]
        yield c, found[0] if task == "multiclass" else np.stack([logits[:, 1] for logits in found], 1)


class _Classifier:
    """A logistic regression that also knows classes of which training saw none."""

    def __init__(self, x: ndarray, y: ndarray, classes: int) -> None:
        from sklearn.linear_model import LogisticRegression

        self.x, self.y, self.classes = x, y.astype(np.int64), classes
        self.seen: Int[ndarray, "seen"] = np.unique(self.y)
        self.model = LogisticRegression(max_iter=LOGISTIC_STEPS, warm_start=True)

    def logits(self, c: float, asked: ndarray) -> Float[ndarray, "asked classes"]:
        """Of every class; the lowest where it was not seen."""
        if len(self.seen) == 1:
            found = np.ones((len(asked), 1))
        else:
            found = self.model.set_params(C=c).fit(self.x, self.y).decision_function(asked)
            found = np.stack([-found, found], 1) if found.ndim == 1 else found
        logits = np.repeat(found.min(1, keepdims=True) - 1, self.classes, 1)
        logits[:, self.seen] = found
        if len(self.seen) == 1:
            logits -= 0.5
        return logits


def _ridge(
    x: ndarray, y: ndarray, asked: ndarray, _task: Task, outputs: int
) -> Iterator[tuple[float, Float[ndarray, "asked outputs"]]]:
    """All targets with one `alpha`."""
    from sklearn.linear_model import Ridge

    for alpha in RIDGE_PENALTIES:
        yield alpha, Ridge(alpha=alpha).fit(x, y.astype(np.float64)).predict(asked).reshape(len(asked), outputs)


FITS: dict[str, tuple[tuple[float, ...], Fit]] = {
    "knn": (NEIGHBOURS, _nearest),
    "logistic-regression": (INVERSE_PENALTIES, _logistic),
    "ridge": (RIDGE_PENALTIES, _ridge),
}
TOLD = {
    "knn": ("k nearest neighbours on the standardised mean", "k"),
    "logistic-regression": ("scikit-learn's logistic regression on the standardised mean", "C"),
    "ridge": ("scikit-learn's ridge regression on the standardised mean", "alpha"),
}
"""What each is, and what validation chooses of it."""
