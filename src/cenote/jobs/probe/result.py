"""What a comparison found: plain data that the report, the command line and Python read alike."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MethodResult:
    """One method on one data set, over all its seeds.

    Attributes:
        method: name in the catalog; where it was tried at several layers, followed by `@` and the layer.
        summary: one line for people.
        settings: the constructor arguments that were used.
        metric: mean over the seeds of the test metric.
        interval: bootstrap 95 % interval of `metric` over test items (whole groups where there are groups).
        metric_per_seed, validation_per_seed: one number per seed.
        learning_rate: the one chosen on validation.
        epochs: epochs trained until the kept state, per seed.
        parameters: trained numbers of pool and classifier.
        multiply_adds: per item, at the data's median token count.
        latency_ms: median milliseconds for one item on this machine, pool and classifier.
        seconds: time to train and evaluate all seeds and learning rates.
        train_loss, validation_curve: one list per seed, one number per epoch, at the chosen learning rate.
        layers: numbers of the layers that were read, of data that number them.
    """

    method: str
    summary: str
    settings: dict[str, Any]
    metric: float
    interval: tuple[float, float]
    metric_per_seed: tuple[float, ...]
    validation_per_seed: tuple[float, ...]
    learning_rate: float
    epochs: tuple[int, ...]
    parameters: int
    multiply_adds: int
    latency_ms: float
    seconds: float
    train_loss: tuple[tuple[float, ...], ...] = ()
    validation_curve: tuple[tuple[float, ...], ...] = ()
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class PairTest:
    """Paired comparison of two methods on the same test items.

    Attributes:
        first, second: names of methods.
        difference: metric of `first` minus metric of `second`.
        interval: bootstrap 95 % interval of `difference`.
        p_value: two-sided, from the paired bootstrap or from Wilcoxon's test: `provenance["significance"]` says which.
        p_adjusted: after Holm's correction within its family (against the baseline, or against the winner).
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    p_adjusted: float


@dataclass(frozen=True)
class Comparison:
    """The whole verdict of `cenote probe`.

    Attributes:
        dataset: what `cenote.features.facts` says of the data, and the names of the classes.
        metric_name: `accuracy`, `balanced accuracy`, `AUROC`, `mean average precision` or `R2`.
        results: best first.
        skipped: method name -> why it could not run on these data.
        baseline: the method that the others are compared with, `mean` (of the last of several layers).
        winner: the method with the best test metric.
        against_baseline, against_winner: paired tests, Holm-corrected as a family each.
        pairs: all pairs, for the significance matrix; Holm-corrected over all of them.
        pareto: names of the methods that no other beats in both metric and latency.
        sentence: the verdict in plain words.
        localisation: method -> how well its weights find the labelled tokens (AUROC), where instance labels were given.
        provenance: versions, machine, seeds, data hash, recipe, command, when.
        complete: False where the run was interrupted and methods are missing.
    """

    dataset: dict[str, Any]
    metric_name: str
    results: tuple[MethodResult, ...]
    skipped: dict[str, str]
    baseline: str
    winner: str
    against_baseline: tuple[PairTest, ...]
    against_winner: tuple[PairTest, ...]
    pairs: tuple[PairTest, ...]
    pareto: tuple[str, ...]
    sentence: str
    localisation: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    def __getitem__(self, method: str) -> MethodResult:
        """The result of one method."""
        for result in self.results:
            if result.method == method:
                return result
        raise KeyError(f"{method!r} was not compared; there are {[r.method for r in self.results]}")

    def to_json(self) -> str:
        """The comparison as text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Inverse of `to_json`."""
        raw = json.loads(text)
        raw["results"] = tuple(_rebuild(MethodResult, r) for r in raw["results"])
        for name in ("against_baseline", "against_winner", "pairs"):
            raw[name] = tuple(_rebuild(PairTest, p) for p in raw[name])
        raw["pareto"] = tuple(raw["pareto"])
        return cls(**raw)

    @classmethod
    def load(cls, out: Path) -> Comparison:
        """Read `comparison.json` of an output folder."""
        return cls.from_json((Path(out) / "comparison.json").read_text("utf-8"))


def _rebuild(cls: type[Any], raw: dict[str, Any]) -> Any:
    return cls(**{k: _as_tuple(v) if isinstance(v, list) else v for k, v in raw.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value
