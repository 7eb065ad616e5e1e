"""Probes in scikit-learn's manners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy import ndarray
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, StratifiedShuffleSplit
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted

from cenote.compare.metrics import METRICS, r2
from cenote.core import Bags, InputError
from cenote.core.arrays import as_tensor
from cenote.features.dataset import Task, TokenDataset
from cenote.jobs.probe.measure import metric_name
from cenote.jobs.probe.module import build_probe
from cenote.jobs.probe.recipe import Recipe
from cenote.jobs.probe.training import TargetScale, predict, train

Sets = ndarray | torch.Tensor | Bags | Sequence[ndarray | torch.Tensor]


class _ProbeEstimator(BaseEstimator):  # type: ignore[misc]
    # of what was pickled by versions that knew no several labels
    _several = False

    def __init__(
        self,
        method: str = "efficient-probing",
        *,
        settings: dict[str, Any] | None = None,
        learning_rates: tuple[float, ...] = Recipe.learning_rates,
        epochs: int = Recipe.epochs,
        patience: int = Recipe.patience,
        batch_size: int = Recipe.batch_size,
        weight_decay: float = Recipe.weight_decay,
        validation_fraction: float = 0.2,
        prefix_tokens: int = 0,
        random_state: int = 0,
    ) -> None:
        self.method = method
        self.settings = settings
        self.learning_rates = learning_rates
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.validation_fraction = validation_fraction
        self.prefix_tokens = prefix_tokens
        self.random_state = random_state

    def _fit(
        self,
        X: Sets,
        y: torch.Tensor,
        task: Task,
        classes: tuple[str, ...],
        groups: Sequence[Any] | NDArray[Any] | None,
    ) -> Self:
        x = _as_features(X)
        if len(x) != len(y):
            raise InputError(f"y: has {len(y)} targets for {len(x)} items of X")
        recipe = Recipe(
            tuple(self.learning_rates),
            epochs=self.epochs,
            patience=self.patience,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
        )
        data = TokenDataset(
            name="X",
            x=x,
            y=y,
            task=task,
            classes=classes,
            ids=tuple(map(str, range(len(y)))),
            split=self._split(y, task, groups),
            prefix_tokens=self.prefix_tokens,
        )
        trained = train(
            lambda: build_probe(self.method, data, self.settings),
            data,
            METRICS[metric_name(task)],
            (self.random_state,),
            recipe,
        )
        if not math.isfinite(trained.validation[0]):
            raise InputError(
                f"{self.method}: its training gave no finite numbers; are X or y very large? scale them first"
            )
        self._several = task == "multilabel"
        self.probe_ = trained.probes[0]
        self.learning_rate_ = trained.learning_rate
        self.validation_score_ = trained.validation[0]
        self.n_features_in_ = data.dim
        return self

    def _split(self, y: torch.Tensor, task: Task, groups: Sequence[Any] | NDArray[Any] | None) -> torch.Tensor:
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction: expected a number between 0 and 1, got {self.validation_fraction}")
        options: dict[str, Any] = {"test_size": self.validation_fraction, "random_state": self.random_state}
        stratify = task in ("binary", "multiclass") and int(np.bincount(y.numpy()).min()) >= 2
        if groups is not None:
            splitter = GroupShuffleSplit(1, **options)
        else:
            splitter = StratifiedShuffleSplit(1, **options) if stratify else ShuffleSplit(1, **options)
        _, validation = next(splitter.split(np.zeros(len(y)), y.numpy() if stratify else None, groups))
        split = torch.zeros(len(y), dtype=torch.int64)
        split[torch.as_tensor(validation)] = 1
        return split

    def _scores(self, X: Sets) -> ndarray:
        check_is_fitted(self, "probe_")
        x = _as_features(X)
        width = x.dim if isinstance(x, Bags) else x.shape[2]
        if width != self.n_features_in_:
            raise InputError(f"X: tokens have width {width}, but the probe was fitted on {self.n_features_in_}")
        items = torch.arange(len(x))
        data = TokenDataset("X", x, items, "multiclass", (), tuple(map(str, items.tolist())), items * 0)
        return predict(self.probe_, data, items, Recipe.tokens_at_once).numpy()

    def transform(self, X: Sets) -> ndarray:
        """Pooled features `[items, width]`, before normalisation and classifier."""
        check_is_fitted(self, "probe_")
        x = _as_features(X)
        with torch.no_grad():
            return self.probe_.pooled(x).numpy()


class ProbeClassifier(ClassifierMixin, _ProbeEstimator):  # type: ignore[misc]
    """A pooling with a linear classifier on frozen token features.

    Args:
        method: name of a pool, see `cenote list`.
        settings: constructor arguments of the pool.
        learning_rates, epochs, patience, batch_size, weight_decay: see `cenote.jobs.probe.Recipe`.
        validation_fraction: share of the items held out of training to choose the learning rate and the epoch.
        prefix_tokens: leading tokens that are [CLS] or registers.
        random_state: seed of initialisation, validation split and batches.

    Attributes:
        classes_: the classes, sorted.
        probe_: the trained `cenote.jobs.probe.Probe`.
        learning_rate_, validation_score_: what validation chose.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(60, 5, 8)).astype("float32")
        >>> y = (X[:, :, 0].mean(1) > 0).astype(int)
        >>> ProbeClassifier("mean", epochs=20).fit(X, y).predict(X[:3]).shape
        (3,)
    """

    def fit(self, X: Sets, y: Any, groups: Sequence[Any] | NDArray[Any] | None = None) -> Self:
        """Fit.

        Args:
            X: `[items, tokens, dim]`, or a list of `[tokens, dim]` arrays.
            y: `[items]` class labels, or `[items, labels]` of 0 and 1, where an item may have several.
            groups: per item the group that must not stand on both sides of the validation split.

        Raises:
            InputError: where shapes do not fit, there is one class only, or targets have fractions.
        """
        labels = np.asarray(y)
        try:
            kind = type_of_target(labels, input_name="y")
        except ValueError as error:
            raise InputError(f"y: {error}") from None
        if kind.startswith("continuous"):
            raise InputError(f"y: holds {labels.dtype} targets with fractions; ProbeRegressor fits those")
        if kind == "multilabel-indicator":
            self.classes_ = np.arange(labels.shape[1])
            return self._fit(
                X, as_tensor(torch.float32, y=labels), "multilabel", tuple(map(str, self.classes_)), groups
            )
        if labels.ndim != 1:
            raise InputError(f"y: expected [items] labels, or [items, labels] of 0 and 1, got shape {labels.shape}")
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y: holds the one class {self.classes_.tolist()}; a classifier needs two")
        task: Task = "binary" if len(self.classes_) == 2 else "multiclass"
        return self._fit(X, torch.as_tensor(numbers), task, tuple(map(str, self.classes_)), groups)

    def predict_proba(self, X: Sets) -> ndarray:
        """Probabilities `[items, classes]`, in the order of `classes_`; of several labels at once each its own."""
        scores = torch.as_tensor(self._scores(X))
        if self._several:
            return scores.sigmoid().numpy()
        if scores.shape[1] == 1:
            p = scores.sigmoid()
            return torch.cat([1 - p, p], 1).numpy()
        return scores.softmax(1).numpy()

    def predict(self, X: Sets) -> ndarray:
        """Most probable class of each item, or `[items, labels]` of 0 and 1 where `y` was so."""
        p = self.predict_proba(X)
        return (p > 0.5).astype(np.int64) if self._several else self.classes_[p.argmax(1)]


class ProbeRegressor(RegressorMixin, _ProbeEstimator):  # type: ignore[misc]
    """A pooling with a linear regressor on frozen token features.

    Arguments and attributes as of `ProbeClassifier`.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).normal(size=(60, 5, 8)).astype("float32")
        >>> ProbeRegressor("mean", epochs=20).fit(X, X[:, :, 0].mean(1)).predict(X[:3]).shape
        (3,)
    """

    def fit(self, X: Sets, y: Any, groups: Sequence[Any] | NDArray[Any] | None = None) -> Self:
        """Fit to `y` `[items]` or `[items, targets]`; other arguments as of `ProbeClassifier.fit`."""
        targets = np.asarray(y, dtype=np.float64)
        if not np.isfinite(targets).all():
            raise InputError("y: holds NaN or infinite targets")
        self._one_target = targets.ndim == 1
        made = torch.as_tensor(targets.reshape(len(targets), -1), dtype=torch.float32)
        return self._fit(X, made, "regression", tuple(map(str, range(made.shape[1]))), groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "target_std_" in state:
            # pickled by a version whose probe gave standardised targets
            mean, deviation = (torch.as_tensor(self.__dict__.pop(n)) for n in ("target_mean_", "target_std_"))
            self.probe_ = TargetScale(mean, deviation).restored(self.probe_)

    def predict(self, X: Sets) -> ndarray:
        """Predicted targets, in the form of `y`."""
        y = self._scores(X)
        return y[:, 0] if self._one_target else y

    def score(self, X: Sets, y: Any, sample_weight: Any = None) -> float:
        """R2, the mean over the targets; in 64 bits, in which squares of large targets are finite."""
        predicted, targets = (np.asarray(v, dtype=np.float64) for v in (self.predict(X), y))
        weights = np.ones(len(targets)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        return float(r2(predicted.reshape(len(targets), -1), targets.reshape(len(targets), -1), weights[None])[0])


def _as_features(X: Sets) -> torch.Tensor | Bags:
    if isinstance(X, Bags):
        X = Bags(X.values.float(), X.offsets)
        if bool((X.lengths() == 0).any()):
            raise InputError("X: some items have no token")
        x: torch.Tensor | Bags = X
        values = X.values
    elif isinstance(X, torch.Tensor) or (isinstance(X, ndarray) and X.dtype != object):
        if X.ndim != 3:
            raise InputError(
                f"X: expected [items, tokens, dim] or a list of [tokens, dim] arrays, got shape {tuple(X.shape)}"
            )
        x = values = as_tensor(torch.float32, X=X)
    else:
        sets = [as_tensor(torch.float32, X=s) for s in X]
        for i, s in enumerate(sets):
            if s.dim() != 2 or s.shape[0] == 0:
                raise InputError(
                    f"X: item {i} has shape {tuple(s.shape)}, expected [tokens, dim] with at least one token"
                )
        x = Bags.from_list(sets)
        values = x.values
    if not bool(values.isfinite().all()):
        raise InputError("X: holds NaN or infinite features")
    return x
