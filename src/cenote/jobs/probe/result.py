"""What a comparison of probes found: plain data that the report, the command line and Python read alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cenote.compare.metrics import OF_SHARES
from cenote.compare.result import ArmResult
from cenote.compare.result import Comparison as Table
from cenote.compare.words import Words


@dataclass(frozen=True, kw_only=True)
class MethodResult(ArmResult):
    """One method on one data set, over all its seeds. Of a reference, what was not measured is `None`.

    Of folds, what is told of the training is that of the first; `metric` is their mean, `seconds` their sum, `latency_ms` their
    median.

    Attributes:
        method: name in the catalog; where it was tried at several layers, followed by `@` and the layer.
        settings: the constructor arguments that were used.
        metric: mean over the seeds of the test metric.
        interval: 95 % interval of `metric` on other items (of other groups where there are groups).
        validation_per_seed: one number per seed.
        learning_rate: the one chosen on validation.
        validation_by_rate: best validation metric at each learning rate of the recipe, mean over the seeds.
        epochs: epochs trained until the kept state, per seed.
        parameters: trained numbers of pool and classifier.
        multiply_adds: per item, at the data's median token count.
        latency_ms: median milliseconds for one item on this machine, pool and classifier.
        seconds: time to train and evaluate all seeds and learning rates.
        train_loss, validation_curve: one list per seed, one number per epoch, at the chosen learning rate.
        layers: numbers of the layers that were read, of data that number them.
    """

    validation_per_seed: tuple[float, ...]
    learning_rate: float | None = None
    epochs: tuple[int, ...] = ()
    parameters: int | None = None
    multiply_adds: int | None = None
    latency_ms: float | None = None
    train_loss: tuple[tuple[float, ...], ...] = ()
    validation_curve: tuple[tuple[float, ...], ...] = ()
    layers: tuple[int, ...] = ()
    validation_by_rate: tuple[float, ...] = ()

    @property
    def cost(self) -> float | None:
        """The latency."""
        return self.latency_ms


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Table[MethodResult]):
    """The whole verdict of `cenote probe`.

    Attributes:
        dataset: what `cenote.features.facts` says of the data, and the names of the classes.
        metric_name: `accuracy`, `balanced accuracy`, `AUROC`, `mean average precision` or `R2`.
        baseline: the method that the others are compared with, `mean` (of the last of several layers).
        pareto: names of the methods that no other beats in both metric and latency.
        localisation: method -> how well its weights find the labelled tokens (AUROC), where instance labels were given.
        provenance: versions, machine, seeds, data hash, recipe, command, when.
    """

    result_type: ClassVar[type[Any]] = MethodResult

    dataset: dict[str, Any]
    localisation: dict[str, float] = field(default_factory=dict)

    @property
    def tested(self) -> str:
        """On how many items, in words."""
        items, folds = self.dataset["items"], self.provenance.get("folds", 1)
        if folds == 1:
            return f"{items['test']:,} test items"
        repeats = self.provenance.get("repeats", 1)
        return f"{sum(items.values()):,} items in {folds if repeats == 1 else f'{repeats} times {folds}'} folds"

    @property
    def words(self) -> Words:
        """Shares are told in per cent."""
        return Words(percent=self.metric_name in OF_SHARES, reference="{} on the mean", remedy="the recipe")
