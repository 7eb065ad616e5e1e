"""One split or several: on which items each method is trained and tested, and its cells as one."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cenote.compare.arms import Arm, OnShare, unheard
from cenote.compare.cells import Cell
from cenote.compare.engine import Engine, Measured, measure
from cenote.compare.folds import Folds
from cenote.compare.inference import Measure
from cenote.compare.units import Units
from cenote.core import InputError
from cenote.core.requirements import require_at_least
from cenote.features import splits
from cenote.features.dataset import SPLITS, TokenDataset
from cenote.features.tokens.source import sha256_of
from cenote.jobs.probe.arms import Column, Fingerprint
from cenote.jobs.probe.measure import measured_by

FOLDS = 5
FEW = 200
"""Test items: a split that was made, and that tests fewer, does not decide alone unless it is asked to."""


@dataclass(frozen=True)
class Plan:
    """The splits of one comparison.

    Attributes:
        data: as given.
        splits: of the folds, round by round; none where the split of the data decides alone.
        folds: of each round.
        repeats: rounds.
        why: why that many, in words; empty where they were asked for or nothing is to be told.
    """

    data: TokenDataset
    splits: tuple[Int[Tensor, "items"], ...] = ()
    folds: int = 1
    repeats: int = 1
    why: str = ""
    _views: dict[tuple[int, int], tuple[TokenDataset, TokenDataset]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return max(1, len(self.splits))

    def view(self, data: TokenDataset, fold: int) -> TokenDataset:
        """The same items, at whatever layer, under the split of a fold; what reads the same data shares the view of it."""
        if not self.splits:
            return data
        return self._views.setdefault((id(data), fold), (data, data.with_split(self.splits[fold])))[1]

    def fingerprinted(self, fingerprint: Fingerprint, column: Column, fold: int) -> Fingerprint:
        """Of what a method reads in a fold: the features are those of the data, which are read once for all folds."""
        if not self.splits:
            return fingerprint
        return lambda _: sha256_of((self.splits[fold],), (fingerprint(column.data),))

    def seen(self, column: Column, fold: int) -> Column:
        """A method, as it reads the data in a fold."""
        return dataclasses.replace(column, data=self.view(column.data, fold))

    def measured(
        self,
        arms: Sequence[Sequence[Arm]],
        baseline: str,
        *,
        folder: Path | None = None,
        workers: int | None = None,
        engine: Engine | None = None,
        on_share: OnShare = unheard,
    ) -> Measured:
        """As `measure`, with one cell for each arm: of folds, the scores of all, and for the rest what the first holds.

        An arm counts as measured when it is in all folds. After Ctrl-C each finished fold is kept.

        Args:
            arms: of each fold, the same in the same order.
            baseline: see `measure`, as for the others.
        """
        if not self.splits:
            return measure(arms[0], baseline, folder=folder, workers=workers, engine=engine, on_share=on_share)
        apart = {
            of_folds[0].name: [InFold(arm, number, len(self)) for number, arm in enumerate(of_folds)]
            for of_folds in zip(*arms, strict=True)
        }
        shares: dict[str, list[float]] = {name: [0.0] * len(self) for name in apart}
        of = {arm.name: arm for of_folds in apart.values() for arm in of_folds}

        def on_fold(name: str, share: float) -> None:
            whole = shares[of[name].arm.name]
            whole[of[name].number] = share
            on_share(of[name].arm.name, sum(whole) / len(whole))

        first, *others = [arm.name for arm in apart[baseline]]
        found = measure(
            list(of.values()), first,
            needed=others, folder=folder, workers=workers, engine=engine, on_share=on_fold,
        )  # fmt: skip
        done = tuple(arm for arm in arms[0] if all(f.name in found.cells for f in apart[arm.name]))
        cells = {arm.name: _joined(arm.name, [found.cells[f.name] for f in apart[arm.name]]) for arm in done}
        return Measured(done, cells, {of[n].arm.name: why for n, why in found.skipped.items()}, found.complete)

    def judged_on(self, metric: str) -> tuple[Units, Measure, Folds | None]:
        """The test items, of all folds one after the other, how logits of them are judged, and in which fold each is."""
        if not self.splits:
            return *measured_by(self.data, metric), None
        parts = [measured_by(self.data.with_split(split), metric) for split in self.splits]
        groups = None if self.data.groups is None else [g for units, _ in parts for g in units.groups or ()]
        units = Units([name for units, _ in parts for name in units.names], groups)
        folds = Folds(
            np.repeat(np.arange(len(parts)), [len(units) for units, _ in parts]),
            tuple(int((split == SPLITS.index("train")).sum()) for split in self.splits),
        )
        return units, Measure.known(metric, np.concatenate([by.truth for _, by in parts])), folds

    def tested(self) -> Int[Tensor, "tested"]:
        """The items that are tested: of folds, all."""
        return torch.arange(len(self.data)) if self.splits else self.data.indices("test")

    def told(self) -> str:
        """How many folds and why, in a line; empty where one split decides as ever."""
        if not self.splits:
            return f"one split: {self.why}" if self.why else ""
        rounds = f"{self.repeats} times {self.folds}" if self.repeats > 1 else str(self.folds)
        tested = int((self.splits[0] == SPLITS.index("test")).sum())
        why = f": {self.why}" if self.why else ""
        return f"{rounds} folds of about {tested} test items{why}"

    def provenance(self) -> Mapping[str, Any]:
        """What a reader needs to make the same splits."""
        told: dict[str, Any] = {"folds": self.folds, "repeats": self.repeats}
        if self.data.split_seed is not None:
            told["split_seed"] = self.data.split_seed
        return {**told, "folds_because": self.why} if self.why else told


@dataclass(frozen=True)
class InFold(Arm):
    """An arm in one of several folds.

    Attributes:
        arm: on the data under the split of the fold.
        number: of the fold, from 0.
        folds: how many there are, in all rounds.
    """

    arm: Arm
    number: int
    folds: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the arm, and the fold."""
        return f"{self.arm.name}, fold {self.number + 1} of {self.folds}"

    def key(self) -> Mapping[str, Any]:
        """The arm's own, which holds the split."""
        return {"kind": f"{type(self.arm).__module__}.{type(self.arm).__qualname__}", "of": dict(self.arm.key())}

    def sources(self) -> tuple[type | ModuleType, ...]:
        """The arm's own."""
        return self.arm.sources()

    def unfit(self) -> str | None:
        """As the arm."""
        return self.arm.unfit()

    def run(self, on_share: OnShare = unheard) -> Cell:
        """The arm's cell under this name."""
        return dataclasses.replace(self.arm.run(lambda _, share: on_share(self.name, share)), name=self.name)

    def finish(self, cell: Cell) -> Cell:
        """As the arm."""
        return self.arm.finish(cell)

    def work(self) -> int:
        """As the arm."""
        return self.arm.work()

    def gains_by_processes(self) -> bool:
        """As the arm."""
        return self.arm.gains_by_processes()

    def travelling(self) -> Self:
        """With an arm that can travel."""
        return dataclasses.replace(self, arm=self.arm.travelling())


def asked(folds: int | None, repeats: int, significance: str) -> int | None:
    """How many folds were asked for; `None`: none, nor a single split.

    Raises:
        InputError: where that does not go together.
    """
    require_at_least(1, repeats=repeats)
    if folds is not None:
        require_at_least(1, folds=folds)
    if folds == 1 and repeats > 1:
        raise InputError(f"repeats: {repeats} rounds need folds, got folds of 1; give folds of 2 or more")
    wanted = FOLDS if folds is None and repeats > 1 else folds
    if wanted is not None and wanted > 1 and significance == "wilcoxon":
        raise InputError("significance: wilcoxon is a test of a single split; leave it out, or give folds of 1")
    return wanted


def planned(data: TokenDataset, folds: int | None = None, repeats: int = 1, significance: str = "permutation") -> Plan:
    """One split or several.

    Args:
        data: to be split, or split already.
        folds: how many; 1: the split of the data decides alone. `None`: `FOLDS` where that split was made and tests fewer than
            `FEW` items, if the items can be dealt out so, else 1.
        repeats: of the folds, each with another assignment.
        significance: Wilcoxon's test is one of a single split.

    Raises:
        InputError: where folds are asked for that cannot be made.
    """
    wanted = asked(folds, repeats, significance)
    if wanted is not None and wanted > 1:
        return Plan(data, splits.folds(data, wanted, repeats), wanted, repeats)
    tested = len(data.indices("test"))
    if wanted == 1 or data.split_seed is None or tested >= FEW or significance == "wilcoxon":
        return Plan(data)
    few = f"a single split would test {tested} items, fewer than {FEW}"
    try:
        made = splits.folds(data, FOLDS)
    except InputError as error:
        return Plan(data, why=f"{few}, but there can be no {FOLDS} folds ({error})")
    return Plan(data, made, FOLDS, why=f"{few} (--folds 1 forces it)")


def _joined(name: str, cells: Sequence[Cell]) -> Cell:
    """The cell of an arm from those of its folds."""
    first = cells[0]
    record = {**first.record, "seconds": sum(float(cell.record["seconds"]) for cell in cells)}
    if "latency_ms" in record:
        record["latency_ms"] = statistics.median(float(cell.record["latency_ms"]) for cell in cells)
    return Cell(name, record, {**first.tensors, "scores": torch.cat([cell.scores for cell in cells], 1)})
