"""What a finished comparison tested: which items, with which labels, in which folds, and what every method said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cenote.compare import Units
from cenote.compare.cells import Cells
from cenote.compare.engine import CELLS
from cenote.compare.folds import Folds
from cenote.compare.inference import Measure
from cenote.core import InputError, files
from cenote.jobs.probe.result import Comparison

FILE = "tested.safetensors"
AGAIN = "run cenote probe again in that folder: finished methods are not trained again"
NEAR = 1e-6
"""By which a metric may miss what the comparison says, before its scores are those of another."""


@dataclass(frozen=True, eq=False)
class Tested:
    """The test items of a comparison, and the scores of its methods.

    Attributes:
        units: the items, of folds one fold after the other.
        truth: their labels or targets, as the metric takes them.
        folds: in which each was tested; `None`: in one split.
        scores: method -> `[seeds, items, ...]`.
    """

    units: Units
    truth: NDArray[Any]
    folds: Folds | None
    scores: Mapping[str, NDArray[Any]]

    def places(self) -> dict[tuple[str, int], int]:
        """Where each item stands, by its name and its fold."""
        of = [0] * len(self.units) if self.folds is None else self.folds.of_unit.tolist()
        return {(name, fold): place for place, (name, fold) in enumerate(zip(self.units.names, of, strict=True))}

    def ordered(self, order: NDArray[np.int64]) -> Tested:
        """The same items in another order."""
        groups = None if self.units.groups is None else [self.units.groups[i] for i in order.tolist()]
        return Tested(
            Units([self.units.names[i] for i in order.tolist()], groups),
            self.truth[order],
            None if self.folds is None else Folds(self.folds.of_unit[order], self.folds.trained_on),
            {name: scores[:, order] for name, scores in self.scores.items()},
        )


def save(folder: Path, units: Units, by: Measure, folds: Folds | None) -> None:
    """Write which items were tested; what was said of them stands in the cells."""
    words = {"names": list(units.names), "groups": None if units.groups is None else list(units.groups)}
    tensors = {"truth": torch.as_tensor(by.truth)}
    if folds is not None:
        tensors |= {"fold": torch.as_tensor(folds.of_unit), "trained": torch.tensor(folds.trained_on)}
    files.write_tensors(folder / FILE, tensors, {"words": json.dumps(words)})


def load(folder: Path, comparison: Comparison) -> Tested:
    """Read what `save` wrote, and the scores out of the cells.

    Raises:
        InputError: where something is missing, damaged, or of another comparison.
    """
    try:
        stored = files.read_tensors(folder / FILE)
        words = json.loads(stored.metadata["words"])
        units = Units(words["names"], words["groups"])
        truth = stored.tensors["truth"].numpy()
        folds = None
        if "fold" in stored.tensors:
            folds = Folds(stored.tensors["fold"].numpy(), tuple(stored.tensors["trained"].tolist()))
    except FileNotFoundError:
        raise InputError(f"{folder}: does not say which items it tested, as runs of before do not; {AGAIN}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / FILE}: is damaged ({error}); {AGAIN}") from error
    cells = Cells(folder / CELLS)
    measure = Measure.known(comparison.metric_name, truth)
    scores = {}
    for result in comparison.results:
        names = [result.method]
        if folds is not None:
            names = [f"{result.method}, fold {n + 1} of {len(folds)}" for n in range(len(folds))]
        try:
            found = [files.read_tensors(cells.path(name), old=False).tensors["scores"] for name in names]
            scores[result.method] = torch.cat(found, 1).double().numpy()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: the scores of {result.method} cannot be read ({error}); {AGAIN}") from error
        _require_own(folder, result.method, scores[result.method], comparison, measure, folds)
    return Tested(units, truth, folds, scores)


def _require_own(
    folder: Path, method: str, scores: NDArray[Any], comparison: Comparison, measure: Measure, folds: Folds | None
) -> None:
    """The cell is the one that the comparison was made of."""
    where = [np.arange(len(measure.truth))]
    if folds is not None:
        where = [np.flatnonzero(folds.of_unit == n) for n in range(len(folds))]
    try:
        found = [
            [float(measure.metric(s[w], measure.truth[w], np.ones((1, len(w))))[0]) for w in where] for s in scores
        ]
        now = float(np.mean(found))
    except (IndexError, ValueError):
        now = math.nan
    if not math.isclose(now, comparison[method].metric, rel_tol=NEAR, abs_tol=NEAR):
        raise InputError(f"{folder}: the scores of {method} are of another run than its comparison.json; {AGAIN}")
