"""What probes are measured by: the metric that fits a task, and the test that fits the metric."""

from __future__ import annotations

from typing import get_args

from cenote.compare.inference import Measure
from cenote.compare.metrics import SHARES
from cenote.compare.statistics import Significance
from cenote.compare.units import Units
from cenote.core import InputError
from cenote.features.dataset import Task, TokenDataset

DEFAULTS: dict[Task, str] = {
    "binary": "AUROC",
    "multiclass": "accuracy",
    "multilabel": "mean average precision",
    "regression": "R2",
}
FITTING: dict[Task, tuple[str, ...]] = {
    "binary": (
        *("AUROC", "accuracy", "balanced accuracy", "F1", "average precision", "Matthews"),
        *("negative log loss", "negative calibration error"),
    ),
    "multiclass": (
        *("accuracy", "balanced accuracy", "macro F1", "Matthews", "quadratic kappa"),
        *("negative log loss", "negative calibration error"),
    ),
    "multilabel": ("mean average precision", "macro F1", "micro F1"),
    "regression": ("R2", "negative MAE", "negative RMSE", "Spearman"),
}


def metric_name(task: Task, wanted: str | None = None) -> str:
    """The metric for a task: as wanted, or the task's own.

    Raises:
        InputError: where the wanted metric does not fit the task.
    """
    if wanted is None:
        return DEFAULTS[task]
    by_lower = {name.lower(): name for name in FITTING[task]}
    if wanted.lower() not in by_lower:
        raise InputError(f"metric: {wanted!r} does not fit a {task} task; choose from {', '.join(FITTING[task])}")
    return by_lower[wanted.lower()]


def judged_by(task: Task, metric: str | None = None, significance: str = "permutation") -> str:
    """The metric that methods are compared by.

    Raises:
        InputError: where it does not fit the task, or the source of p-values does not fit the metric.
    """
    name = metric_name(task, metric)
    if significance not in get_args(Significance):
        told = "; the bootstrap over few groups called chance a winner" if significance == "bootstrap" else ""
        raise InputError(f"significance: expected permutation or wilcoxon, got {significance!r}{told}")
    if significance == "wilcoxon" and name not in SHARES:
        fitting = [m for m in FITTING[task] if m in SHARES]
        raise InputError(
            f"significance: wilcoxon compares what each item adds to the metric, and {name} ranks items against each other; "
            f"use permutation{''.join(f', or metric {m!r}' for m in fitting)}"
        )
    return name


def measured_by(data: TokenDataset, metric: str) -> tuple[Units, Measure]:
    """The test items, and how logits of them are judged."""
    items = data.indices("test")
    numbers = items.tolist()
    groups = None if data.groups is None else tuple(data.groups[i] for i in numbers)
    units = Units(tuple(data.ids[i] for i in numbers), groups)
    return units, Measure.known(metric, data.y[items].numpy())
